"""Options of a comparison, and how they are typed."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torchstone.compare.match import Match
from torchstone.compare.result import Metric
from torchstone.compare.variants import split_values
from torchstone.errors import TorchstoneError, nearest

__all__ = ["Options", "grid_of", "numbers_of", "one_of", "seconds_of", "whole_numbers_of"]


@dataclass(frozen=True)
class Options:
    """How to compare.

    Attributes:
        seeds: of the report.
        jobs: cells at once.
        match, tolerance: what is made equal by the feed-forward width, and how far off it may stay.
        tune: (field, grid) that every variant is tuned over, on other seeds.
        tuning_seeds: how many.
        margin: what counts as equivalent, as a share of the reference.
        budget: seconds that the whole may take; steps are cut to fit.
        budgets: factors on the steps, each a comparison of its own.
        metric: None takes what the recipe's data call for.
        dry_run: only say what it would cost.
        imports: modules that workers import first, for kinds that no file of their family holds.
        ray: whether cells are tasks of a Ray cluster instead of processes here.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    jobs: int = 1
    match: Match = "none"
    tolerance: float = 0.01
    tune: tuple[str, tuple[float, ...]] | None = None
    tuning_seeds: int = 1
    margin: float = 0.005
    budget: float | None = None
    budgets: tuple[float, ...] = (1.0,)
    metric: Metric | None = None
    dry_run: bool = False
    imports: tuple[str, ...] = ()
    ray: bool = False


def one_of(option: str, value: str, allowed: Sequence[str]) -> str:
    """The value, if it is allowed.

    Raises:
        TorchstoneError: it is not.
    """
    if value not in allowed:
        raise TorchstoneError(f"{option}: one of {', '.join(allowed)}, not {value!r}{nearest(value, allowed)}")
    return value


def numbers_of(option: str, text: str) -> tuple[float, ...]:
    """``1,2,4`` as numbers above zero.

    Raises:
        TorchstoneError: something else.
    """
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(math.isfinite(value) and value > 0 for value in found):
        raise TorchstoneError(f"{option}: needs numbers above zero, as in 1,2,4; got {text!r}")
    return found


def whole_numbers_of(option: str, text: str) -> tuple[int, ...]:
    """``128,256`` as whole numbers above zero.

    Raises:
        TorchstoneError: something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise TorchstoneError(f"{option}: needs whole numbers above zero, as in 128,256; got {text!r}")
    return tuple(int(part) for part in parts)


def grid_of(text: str) -> tuple[str, tuple[float, ...]]:
    """``optimizer.lr=1e-3,3e-3,1e-2`` as a field and its values, ascending.

    Raises:
        TorchstoneError: no field, or fewer than three values: an optimum between two cannot be seen.
    """
    path, equals, values = text.partition("=")
    grid = numbers_of("--tune", ",".join(split_values(values))) if equals else ()
    if not path.strip() or len(set(grid)) < 3:
        raise TorchstoneError(f"--tune: needs FIELD=A,B,C with three values or more, got {text!r}")
    return path.strip(), tuple(sorted(set(grid)))


def seconds_of(text: str) -> float:
    """``90s``, ``30m``, ``2h`` or a number of seconds.

    Raises:
        TorchstoneError: something else.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh]?)", text.strip())
    if found is None or float(found.group(1)) == 0:
        raise TorchstoneError(f"--budget: needs a time as in 90s, 30m or 2h, got {text!r}")
    return float(found.group(1)) * {"": 1, "s": 1, "m": 60, "h": 3600}[found.group(2)]
