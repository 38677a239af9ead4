"""Rewards: what an answer is worth, by a rule over its text and the fields of its prompt.

    reward = spec.build()
    reward("<answer>4</answer>", {"answer": "4"})        # 1.0

None says that the answer cannot be scored: it is then left out of its group's baseline and of the loss. A reward that
has a method ``batch(texts, rows)``, as one that asks a model, is asked once for all answers of a rollout.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from torchstone.errors import TorchstoneError
from torchstone.spec import PartSpec, lazy_parts

__all__ = ["Reward", "RewardSpec", "Scorer"]

__getattr__ = lazy_parts(__name__)

Reward = Callable[[str, Mapping[str, Any]], float | None]
"""From an answer and the fields of its prompt to what it is worth. It may have a ``batch(texts, rows)`` of its own,
which gives a sequence of the same."""


class RewardSpec(PartSpec):
    """What an answer is worth."""

    family: ClassVar[str] = "reward"
    default_kind: ClassVar[str] = "exact"

    weight: float = Field(1.0, ge=-1e6, le=1e6)
    """How much it counts in the sum of all rewards."""
    only: str | None = Field(None, min_length=1)
    """A field of prompts; answers to prompts without it, or with null in it, have the other rewards alone."""

    def scores(self, row: Mapping[str, Any]) -> bool:
        """Whether it is for answers to a prompt with these fields."""
        return self.only is None or row.get(self.only) is not None

    @property
    def columns(self) -> tuple[str, ...]:
        """Fields that every prompt has to have whose answers it scores."""
        return ()

    def answer_of(self, text: str) -> Hashable | None:
        """What a text gives as its answer, alike for answers that are worth the same; None where a rule finds none."""
        return None

    def build(self) -> Reward:
        """The rule.

        Raises:
            TorchstoneError: what it needs is not there.
        """
        raise NotImplementedError


def _named(row: Mapping[str, Any], number: int) -> str:
    return getattr(row, "where", f"prompt {number}")


def _number(name: str, value: Any, prompt: str) -> float | None:
    try:
        number = None if value is None else float(value) if isinstance(value, numbers.Real) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number or 0.0):
        raise TorchstoneError(
            f"reward {name}: gave {value!r:.60} for an answer to {prompt}; a finite number or None is needed"
        )
    return number


class Scorer:
    """All rewards of a training, by name: the kind's, with a number from the second of one kind on.

    Args:
        specs: the rewards.

    Raises:
        TorchstoneError: what one needs is not there.
    """

    def __init__(self, specs: Sequence[RewardSpec]) -> None:
        self.rules: dict[str, tuple[RewardSpec, Reward]] = {}
        for spec in specs:
            same = sum(known.kind == spec.kind for known, _ in self.rules.values())
            self.rules[spec.kind if not same else f"{spec.kind}_{same + 1}"] = spec, spec.build()

    @property
    def names(self) -> list[str]:
        """Of the rewards, in order."""
        return list(self.rules)

    def check(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Refuse prompts without the fields that rewards look at, and those that no reward is for; null is none. A row
        with a `where` is named by it.

        Raises:
            TorchstoneError: names the first such row, and the field.
        """
        specs = [spec for spec, _ in self.rules.values()]
        for number, row in rows.items():
            if specs and not any(spec.scores(row) for spec in specs):
                fields = ", ".join(repr(spec.only) for spec in specs)
                raise TorchstoneError(f"rewards: none is for {_named(row, number)}; they are for prompts with {fields}")
        for name, (spec, _) in self.rules.items():
            for number, row in rows.items():
                if not spec.scores(row):
                    continue
                if missing := next((field for field in spec.columns if row.get(field) is None), None):
                    has = "null in" if missing in row else "no"
                    raise TorchstoneError(
                        f"reward {name}: {_named(row, number)} has {has} field {missing!r}; fields: "
                        f"{', '.join(list(row)[:10]) or 'none'}"
                    )

    def score_all(
        self, texts: Sequence[str], rows: Sequence[Mapping[str, Any]], examples: Sequence[int]
    ) -> list[dict[str, float | None]]:
        """Rewards of each answer, those that are for its prompt. `rows` are the prompts' fields, `examples` their
        numbers.

        Raises:
            TorchstoneError: a rule failed, or gave something else than a finite number or None for each answer; names
                the prompt.
        """
        found: list[dict[str, float | None]] = [{} for _ in texts]
        prompts = [_named(row, example) for row, example in zip(rows, examples, strict=True)]
        for name, (spec, rule) in self.rules.items():
            asked = [n for n, row in enumerate(rows) if spec.scores(row)]
            ask: Any = getattr(rule, "batch", None)
            for some in [[n] for n in asked] if ask is None else [asked] if asked else []:
                several = "an answer" if len(some) == 1 else f"{len(some)} answers, the first of them"
                to = f"{several} to {prompts[some[0]]}"
                try:
                    if ask is None:
                        values = [rule(texts[some[0]], rows[some[0]])]
                    else:
                        values = list(ask([texts[n] for n in some], [rows[n] for n in some]))
                except Exception as error:
                    raise TorchstoneError(
                        f"reward {name}: failed for {to} ({type(error).__name__}: {error})"
                    ) from error
                if len(values) != len(some):
                    raise TorchstoneError(f"reward {name}: gave {len(values)} scores for {to}")
                for n, value in zip(some, values, strict=True):
                    found[n][name] = _number(name, value, prompts[n])
        return found

    def total(self, rewards: Mapping[str, float | None]) -> float | None:
        """The weighted sum; None as soon as one is None, for sums of different rewards do not compare."""
        total = 0.0
        for name, value in rewards.items():
            if value is None:
                return None
            total += self.rules[name][0].weight * value
        return total
