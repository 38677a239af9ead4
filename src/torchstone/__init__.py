"""Torchstone: one composable Transformer, one training engine, one generation engine, and claims that run."""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchstone.api import Run, build, compare, import_run, inspect, load, reproduce, train
    from torchstone.errors import TorchstoneError
    from torchstone.recipe import Recipe, load_recipe

__all__ = [
    "Recipe",
    "Run",
    "TorchstoneError",
    "build",
    "compare",
    "import_run",
    "inspect",
    "load",
    "load_recipe",
    "reproduce",
    "train",
]

__version__ = "0.1.0"

_HOMES = {"TorchstoneError": "errors", "Recipe": "recipe", "load_recipe": "recipe"}


def __getattr__(name: str) -> Any:
    # importing torchstone stays cheap: `torchstone --help` and a single part need no training engine
    if name not in __all__:
        raise AttributeError(f"module 'torchstone' has no attribute {name!r}")
    return getattr(importlib.import_module(f"torchstone.{_HOMES.get(name, 'api')}"), name)


class _Verb(types.ModuleType):
    """A package that shares its name with a function: calling ``torchstone.train`` calls the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module("torchstone.api"), self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Torchstone(types.ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # the import of a package sets it as an attribute here, which would hide the function of that name
        if name in __all__ and isinstance(value, types.ModuleType):
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Torchstone
