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

    @property
    def columns(self) -> tuple[str, ...]:
        """Fields that every prompt has to have."""
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
        """Refuse prompts without the fields that rewards look at; null is none. A row with a `where` is named by it.

        Raises:
            TorchstoneError: names the first such row, and the field.
        """
        for name, (spec, _) in self.rules.items():
            for number, row in rows.items():
                if missing := next((field for field in spec.columns if row.get(field) is None), None):
                    has = "null in" if missing in row else "no"
                    raise TorchstoneError(
                        f"reward {name}: {_named(row, number)} has {has} field {missing!r}; fields: "
                        f"{', '.join(list(row)[:10]) or 'none'}"
                    )

    def score_all(
        self, texts: Sequence[str], rows: Sequence[Mapping[str, Any]], examples: Sequence[int]
    ) -> list[dict[str, float | None]]:
        """Each reward of each answer. `rows` are the fields of their prompts, `examples` the prompts' numbers.

        Raises:
            TorchstoneError: a rule failed, or gave something else than a finite number or None for each answer; names
                the prompt.
        """
        found: list[dict[str, float | None]] = [{} for _ in texts]
        prompts = [_named(row, example) for row, example in zip(rows, examples, strict=True)]
        for name, (_, rule) in self.rules.items():
            ask: Any = getattr(rule, "batch", None)
            size = 1 if ask is None else max(1, len(texts))
            for first in range(0, len(texts), size):
                to = f"{'an answer' if size == 1 else f'{size} answers, the first of them'} to {prompts[first]}"
                try:
                    values = [rule(texts[first], rows[first])] if ask is None else list(ask(texts, rows))
                except Exception as error:
                    raise TorchstoneError(
                        f"reward {name}: failed for {to} ({type(error).__name__}: {error})"
                    ) from error
                if len(values) != size:
                    raise TorchstoneError(f"reward {name}: gave {len(values)} scores for {to}")
                for n, value in enumerate(values, first):
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
