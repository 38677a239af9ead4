"""What every evaluation gives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torchstone.evaluate.intervals import Estimate

__all__ = ["Result"]


@dataclass(frozen=True)
class Result:
    """The figures of one task on one source.

    Attributes:
        task: what was asked: text, multiple_choice, classification, minimal_pairs, infilling, or a task of the harness.
        source: where the items came from.
        metrics: estimates by name.
        facts: how many items there were, and how they were scored.
        groups: the first metric by group, where the items name groups.
    """

    task: str
    source: str
    metrics: Mapping[str, Estimate]
    facts: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, Estimate] = field(default_factory=dict)

    def __getitem__(self, metric: str) -> Estimate:
        return self.metrics[metric]

    def dump(self) -> dict[str, Any]:
        """Plain data for JSON; figures beyond the range of numbers become None."""
        return {
            "task": self.task,
            "source": self.source,
            "metrics": {name: _plain(estimate) for name, estimate in self.metrics.items()},
            **({"groups": {name: _plain(estimate) for name, estimate in self.groups.items()}} if self.groups else {}),
            **self.facts,
        }

    def lines(self) -> Iterator[str]:
        """A few lines for people."""
        facts = ", ".join(f"{name} {value}" for name, value in self.facts.items())
        yield f"{self.task} {self.source}" + (f" ({facts})" if facts else "")
        for name, estimate in self.metrics.items():
            yield f"    {name:<24} {estimate}"
        for name, estimate in self.groups.items():
            yield f"        {name:<36} {estimate}"


def _plain(estimate: Estimate) -> dict[str, float | None]:
    return {name: x if x is not None and math.isfinite(x) else None for name, x in asdict(estimate).items()}
