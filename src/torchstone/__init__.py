"""Torchstone: one composable Transformer, one training engine, one generation engine, and claims that run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchstone.api import Run, build, inspect, load, train
    from torchstone.errors import TorchstoneError
    from torchstone.recipe import Recipe, load_recipe

__all__ = ["Recipe", "Run", "TorchstoneError", "build", "inspect", "load", "load_recipe", "train"]

__version__ = "0.1.0"

_HOMES = {"TorchstoneError": "errors", "Recipe": "recipe", "load_recipe": "recipe"}


def __getattr__(name: str) -> Any:
    # importing torchstone stays cheap: `torchstone --help` and a single part need no training engine
    if name not in __all__:
        raise AttributeError(f"module 'torchstone' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"torchstone.{_HOMES.get(name, 'api')}"), name)
