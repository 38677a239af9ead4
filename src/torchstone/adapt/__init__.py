"""Adapting a model that exists: which of its parameters train, what is put beside them, and what is put before its
inputs. Importing this package imports no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchstone.adapt.structured_prompting import StructuredPrompt
    from torchstone.recipe import AdaptSpec

__all__ = ["AdaptSpec", "StructuredPrompt"]

_HOMES = {"AdaptSpec": "torchstone.recipe", "StructuredPrompt": "torchstone.adapt.structured_prompting"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torchstone.spec import lazy_parts

    return lazy_parts(__name__)(name)
