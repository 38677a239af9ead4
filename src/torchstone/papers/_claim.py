"""Papers as metadata and claims that run.

A claim is a sentence, what it measures, and gates that decide. A `Number` gate is about something that has no seed: an
identity, a count, bytes, operations. An `Effect` gate is about a difference between two arms over seeds: it names a
margin, a null arm and a sabotage arm.

A claim holds if all its gates hold, does not hold if one does not, and is inconclusive otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torchstone.compare.decide import Gate as Answer
from torchstone.compare.decide import gate

__all__ = [
    "Arms",
    "Claim",
    "Effect",
    "Kind",
    "Measured",
    "Number",
    "Paper",
    "Scale",
    "Setting",
    "decide_claim",
    "one_thread",
]

Kind = Literal["behaviour", "cost", "arithmetic", "identity"]
Scale = Literal["quick", "evidence", "gpu"]

Numbers = Mapping[str, float]
Values = Mapping[str, Sequence[float]]
"""Arm -> its metric by seed, in one order of seeds for all arms."""


@dataclass(frozen=True)
class Number:
    """A gate on one number: it holds if low <= number <= high. For identities, counts, bytes and operations."""

    name: str
    low: float = -math.inf
    high: float = math.inf

    def answer(self, numbers: Numbers, values: Values) -> Answer:
        """Whether the number lies where it must; it is the same for every seed."""
        found = numbers[self.name]
        return "holds" if self.low <= found <= self.high else "does not hold"

    def controls(self, values: Values) -> dict[str, Answer]:
        """None: there is no chance in it."""
        return {}

    @property
    def needs(self) -> tuple[str, ...]:
        """Arms that it looks at."""
        return ()

    @property
    def control_arms(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class Effect:
    """A gate on the difference between an arm and a reference, seed by seed.

    Attributes:
        name: in words.
        arm, against: names of arms; the strongest cheap baseline is what an effect is measured against.
        margin: the arm must be better by more than this; a negative one: it must not be worse by more than its size.
        null: the arm that has the reference in the method's place; needed where the margin is not negative.
        sabotage: the arm with one plausible defect.
        lower_is_better: direction of the metric.
    """

    name: str
    arm: str
    against: str
    margin: float
    sabotage: str
    null: str | None = None
    lower_is_better: bool = True

    def __post_init__(self) -> None:
        if self.margin >= 0 and self.null is None:
            raise TypeError(f"gate {self.name}: a claim of superiority needs a null arm")

    def differences(self, values: Values, arm: str) -> list[float]:
        """Of an arm to the reference, over the seeds that both have."""
        return [a - b for a, b in zip(values[arm], values[self.against], strict=False)]

    def answer(self, numbers: Numbers, values: Values) -> Answer:
        """By the rule of `torchstone.compare.decide.gate`."""
        return gate(self.differences(values, self.arm), self.margin, self.lower_is_better)

    def controls(self, values: Values) -> dict[str, Answer]:
        """What the same gate says of the null arm and of the sabotage arm: neither may hold."""
        arms = [arm for arm in (self.null, self.sabotage) if arm is not None]
        return {arm: gate(self.differences(values, arm), self.margin, self.lower_is_better) for arm in arms}

    @property
    def needs(self) -> tuple[str, ...]:
        """Arms that it looks at."""
        return (self.arm, self.against, *self.control_arms)

    @property
    def control_arms(self) -> tuple[str, ...]:
        return tuple(arm for arm in (self.null, self.sabotage) if arm is not None)


@dataclass(frozen=True)
class Setting:
    """How much a scale spends.

    Attributes:
        seeds: of every arm.
        control_seeds: of null and sabotage arms.
        patch: laid over the recipe of all arms (steps, widths).
        tune: (field, grid) for every arm, None where the claim fixes it.
    """

    seeds: int = 5
    control_seeds: int = 3
    patch: Mapping[str, Any] = field(default_factory=dict)
    tune: tuple[str, tuple[float, ...]] | None = None


@dataclass(frozen=True)
class Arms:
    """Arms of a comparison: a recipe, patches on it by name, the metric, and what each scale spends.

    Arms in `shifted` are trained under other seeds than the rest: a null arm is the reference drawn anew. `imports`
    names modules that define kinds of a claim's own: defects for sabotage arms.
    """

    recipe: Mapping[str, Any]
    patches: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Setting]
    metric: str = "test_bits_per_byte"
    shifted: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()


def one_thread(steps: int, batch: int, **evaluate: int) -> dict[str, Any]:
    """Sections `trainer` and `evaluate` of a small training that everybody repeats to the bit: one thread, float32,
    nothing compiled, one measurement at the end.

    Args:
        steps: of the optimiser.
        batch: rows a step.
        evaluate: other fields of `evaluate`, as `test_blocks`.
    """
    trainer = {
        "steps": steps,
        "batch": batch,
        "threads": 1,
        "precision": "fp32",
        "compile": "off",
        "save_every": steps,
    }
    return {"trainer": trainer, "evaluate": {"every": steps, **evaluate}}


@dataclass(frozen=True)
class Measured:
    """What a function of a claim gives where no comparison fits: numbers without seeds, arms with."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[str, Mapping[int, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        id: within the paper; a change after evidence was seen is a new id.
        kind: behaviour, cost, arithmetic or identity.
        text: the claim, in a sentence of our own.
        figure: what the paper says, in numbers.
        gates: what decides.
        arms: the comparison that measures it, and / or
        run: a function of the scale and the first seed that measures it; its attribute `builds` names modules whose
            source counts as that of the claim's parts.
        scales: those that `run` has.
        withdrawn: why a later id takes its place; its verdict stays listed.
    """

    id: str
    kind: Kind
    text: str
    figure: str
    gates: tuple[Number | Effect, ...]
    arms: Arms | None = None
    run: Callable[[Scale, int], Measured] | None = None
    scales: tuple[Scale, ...] = ("quick", "evidence", "gpu")
    withdrawn: str | None = None


@dataclass(frozen=True)
class Paper:
    """A paper's page in code: `PAPER` of ``torchstone/papers/<slug>.py``."""

    slug: str
    title: str
    authors: str
    year: int
    link: str
    topics: tuple[str, ...]
    parts: tuple[str, ...]
    summary: str
    claims: tuple[Claim, ...]

    def claim(self, name: str) -> Claim | None:
        """The claim of an id."""
        return next((claim for claim in self.claims if claim.id == name), None)


def decide_claim(claim: Claim, numbers: Numbers, values: Values) -> tuple[str, list[dict[str, Any]]]:
    """The verdict and each gate's answer with its controls.

    A claim whose null or sabotage arm passes a gate is "not discriminating", whatever the gate says.
    """
    rows: list[dict[str, Any]] = []
    for each in claim.gates:
        row: dict[str, Any] = {"gate": each.name, "answer": each.answer(numbers, values)}
        if isinstance(each, Effect):
            row |= {"margin": each.margin, "controls": each.controls(values)}
        else:
            finite = {"low": each.low, "high": each.high}
            row |= {name: value for name, value in finite.items() if math.isfinite(value)}
        rows.append(row)
    answers = [row["answer"] for row in rows]
    if any("holds" in row.get("controls", {}).values() for row in rows):
        return "not discriminating", rows
    if "does not hold" in answers:
        return "does not hold", rows
    return ("inconclusive" if "inconclusive" in answers else "holds"), rows
