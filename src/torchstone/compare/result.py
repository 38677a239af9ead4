"""`Result`: what a comparison found, computed anew from its cells whenever it is asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from torchstone.compare.decide import Interval, Verdict, decide, interval, paired_bootstrap
from torchstone.errors import TorchstoneError
from torchstone.files import read_json

__all__ = ["Arm", "Metric", "Result", "Trend"]

FORMAT = 1


@dataclass(frozen=True)
class Metric:
    """The number that is compared."""

    name: str
    lower_is_better: bool = True

    @classmethod
    def of(cls, name: str, higher_is_better: bool = False) -> Metric:
        """A metric by name; higher is better for accuracies and exact matches, whether it is said or not."""
        return cls(name, not (higher_is_better or name.endswith(("accuracy", "exact"))))


@dataclass(frozen=True)
class Arm:
    """One variant's cells and costs.

    Attributes:
        name: of the variant.
        patch, notes: what distinguishes it; what matching and tuning did.
        cells: by budget (a factor on the steps) and seed: what `run_cell` gave, or why there is none.
        probe: what it costs, measured with nothing else at work.
        tuned: the grid, its scores and the choice; None if untuned.
    """

    name: str
    patch: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    cells: dict[float, dict[int, dict[str, Any]]] = field(default_factory=dict)
    probe: dict[str, Any] = field(default_factory=dict)
    tuned: dict[str, Any] | None = None

    def values(self, metric: str, budget: float) -> dict[int, float]:
        """The metric by seed, of the cells that have it."""
        found = {}
        for seed, cell in sorted(self.cells.get(budget, {}).items()):
            value = cell.get("metrics", {}).get(metric)
            if cell.get("status") == "done" and isinstance(value, int | float) and math.isfinite(value):
                found[seed] = float(value)
        return found

    def troubles(self, budget: float) -> list[str]:
        """Cells without a value, in words."""
        bad = [
            (seed, cell) for seed, cell in sorted(self.cells.get(budget, {}).items()) if cell.get("status") != "done"
        ]
        return [f"seed {seed} {cell.get('status')}: {cell.get('reason')}" for seed, cell in bad]


@dataclass(frozen=True)
class Trend:
    """How the gap to the reference moves with compute: change of the difference when the budget doubles."""

    per_doubling: Interval
    gaps: dict[float, Interval]


@dataclass(frozen=True)
class Result:
    """See the module's docstring; `compare` makes it and `load` reads it back.

    Attributes:
        arms: the first is the reference.
        metric: the number compared.
        seeds: of the cells.
        budgets: factors on the steps, ascending; the table is of the last.
        margin: what counts as equivalent, as a share of the reference's mean.
        facts: how it was made: match, tuning, steps, tokens, machine, corpus.
    """

    arms: tuple[Arm, ...]
    metric: Metric
    seeds: tuple[int, ...]
    budgets: tuple[float, ...] = (1.0,)
    margin: float = 0.005
    facts: dict[str, Any] = field(default_factory=dict)

    # -- what it says

    def intervals(self, budget: float | None = None) -> dict[str, Interval | None]:
        """Mean and interval over seeds of each arm; None where no cell has the metric."""
        at = self.budgets[-1] if budget is None else budget
        values = {arm.name: list(arm.values(self.metric.name, at).values()) for arm in self.arms}
        return {name: interval(found) if found else None for name, found in values.items()}

    def verdicts(self, budget: float | None = None) -> dict[str, Verdict | None]:
        """A verdict for each arm but the reference, over the seeds that both have; None where a cell of either arm has
        no value: what diverges is not compared on its survivors."""
        at = self.budgets[-1] if budget is None else budget
        reference = self.arms[0].values(self.metric.name, at)
        whole = {
            arm.name: values
            for arm in self.arms[1:]
            if list(values := arm.values(self.metric.name, at)) == list(reference) == list(self.seeds)
        }
        found = decide(
            list(reference.values()),
            {name: list(values.values()) for name, values in whole.items()},
            self.margin,
            self.metric.lower_is_better,
        )
        return {arm.name: found.get(arm.name) for arm in self.arms[1:]}

    def documents(self, budget: float | None = None) -> dict[str, Interval | None]:
        """Bits per byte against the reference over held-out documents drawn anew, each averaged over seeds; None where
        fewer than two were read."""
        at = self.budgets[-1] if budget is None else budget

        def mean(arm: Arm) -> tuple[np.ndarray, np.ndarray] | None:
            kept = [cell.get("documents") for cell in arm.cells.get(at, {}).values()]
            if not kept or any(found is None for found in kept):
                return None
            return np.mean([found["bits"] for found in kept], 0), np.asarray(kept[0]["bytes"])  # type: ignore[index]

        base = mean(self.arms[0])
        found: dict[str, Interval | None] = {}
        for arm in self.arms[1:]:
            own = mean(arm)
            same = base is not None and own is not None and len(base[0]) == len(own[0])
            if not same or (own[1] > 0).sum() < 2:  # type: ignore[index]
                found[arm.name] = None
                continue
            found[arm.name] = paired_bootstrap(base[0], own[0], own[1])  # type: ignore[index, arg-type]
        return found

    def trends(self) -> dict[str, Trend | None]:
        """The gap by budget and its slope over the budget's logarithm to base 2, per seed."""
        found: dict[str, Trend | None] = {}
        for arm in self.arms[1:]:
            gaps: dict[float, list[float]] = {}
            for budget in self.budgets:
                own, base = (a.values(self.metric.name, budget) for a in (arm, self.arms[0]))
                if list(own) == list(base) == list(self.seeds):
                    gaps[budget] = [own[seed] - base[seed] for seed in self.seeds]
            if len(gaps) < 2 or len(gaps) < len(self.budgets):
                found[arm.name] = None
                continue
            x = np.log2(np.array(list(gaps)))
            x = x - x.mean()
            slopes = (x @ np.array(list(gaps.values()))) / (x @ x)
            found[arm.name] = Trend(interval(slopes.tolist()), {b: interval(d) for b, d in gaps.items()})
        return found

    # -- forms

    @property
    def table(self) -> str:
        """The table as text."""
        from torchstone.compare.report import text_table

        return text_table(self)

    def plot(self, folder: str | Path) -> list[Path]:
        """Learning curves and loss against cost, as PNG files."""
        from torchstone.compare.report import plots

        Path(folder).mkdir(parents=True, exist_ok=True)
        return plots(self, Path(folder))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the cells, and what follows from them."""
        spans, verdicts, documents = self.intervals(), self.verdicts(), self.documents()
        trends = self.trends() if len(self.budgets) > 1 else {}
        arms = []
        for arm in self.arms:
            verdict, trend = verdicts.get(arm.name), trends.get(arm.name)
            arms.append(
                {
                    "name": arm.name,
                    "patch": list(arm.patch),
                    "notes": list(arm.notes),
                    "interval": _plain(spans[arm.name]),
                    "verdict": _plain(verdict),
                    "documents": _plain(documents.get(arm.name)),
                    "trend": None
                    if trend is None
                    else {
                        "per_doubling": _plain(trend.per_doubling),
                        "gaps": {str(budget): _plain(gap) for budget, gap in trend.gaps.items()},
                    },
                    "probe": arm.probe,
                    "tuned": arm.tuned,
                    "cells": {
                        str(budget): {str(seed): cell for seed, cell in cells.items()}
                        for budget, cells in arm.cells.items()
                    },
                }
            )
        return {
            "format": FORMAT,
            "metric": asdict(self.metric),
            "seeds": list(self.seeds),
            "budgets": list(self.budgets),
            "margin": self.margin,
            "reference": self.arms[0].name,
            "facts": self.facts,
            "variants": arms,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """A result from `to_dict`; what follows from the cells is computed again, not read."""
        arms = tuple(
            Arm(
                body["name"],
                tuple(body["patch"]),
                tuple(body["notes"]),
                {float(b): {int(s): cell for s, cell in cells.items()} for b, cells in body["cells"].items()},
                body["probe"],
                body["tuned"],
            )
            for body in data["variants"]
        )
        metric = Metric(**data["metric"])
        return cls(arms, metric, tuple(data["seeds"]), tuple(data["budgets"]), data["margin"], data["facts"])

    @classmethod
    def load(cls, folder: str | Path) -> Result:
        """The result in a comparison's folder.

        Raises:
            TorchstoneError: none there.
        """
        path = Path(folder) / "results.json"
        data = read_json(path)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise TorchstoneError(f"{path}: no results of a comparison")
        return cls.from_dict(data)


def _plain(value: Any) -> Any:
    """A dataclass as plain data; infinities, which JSON has not, as null."""
    if value is None:
        return None

    def finite(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: finite(inner) for name, inner in x.items()}
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return finite(asdict(value))
