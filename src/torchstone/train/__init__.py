"""Training: engine, optimisers, schedules, checkpoints, run directories, mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchstone.train.engine import Source, Stopped, Trainer
    from torchstone.train.run import RunFolder
    from torchstone.train.training import train

__all__ = ["RunFolder", "Source", "Stopped", "Trainer", "train"]

_HOMES = {"RunFolder": "run", "Source": "engine", "Stopped": "engine", "Trainer": "engine", "train": "training"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
