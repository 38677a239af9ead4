"""What the tests of all objectives know of each: a file ``tests/<any>/cases/<kind>.py``, beside the tests of its wing.

Such a file has, as far as the kind needs them,

    GOLDEN     sections of a recipe, laid over that of the golden losses
    BATCHES    class of the batches there, in the place of the usual ones: see `golden.batches`
    FACTS      what `Facts` holds there besides
    GRADIENT   (maker, sections) of a tiny training in which one batch equals its pieces, as `tiny.recipe`; None for an
               objective over other examples than tokens, which has such a test in its domain
    EXEMPT     test -> why it makes no sense for the kind: "nan" (a position without a target is never looked at),
               "no_targets" (a batch without targets has no gradient)
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["Case", "objective_cases"]


class Case:
    """A case file, with defaults where it is silent."""

    def __init__(self, module: ModuleType) -> None:
        self.golden: dict[str, Any] = getattr(module, "GOLDEN", {})
        self.batches: type | None = getattr(module, "BATCHES", None)
        self.facts: dict[str, Any] = getattr(module, "FACTS", {})
        self.gradient: tuple[Any, dict[str, Any]] | None = getattr(module, "GRADIENT", None)
        self.exempt: dict[str, str] = getattr(module, "EXEMPT", {})


@cache
def objective_cases() -> dict[str, Case]:
    """By kind."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*/cases/*.py")):
        spec = importlib.util.spec_from_file_location(f"objective_case_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[path.stem] = Case(module)
    return found
