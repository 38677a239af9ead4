"""Tiny models for the checks: one per variant, and an array of cases in which every variant meets every kind.

What is legal is judged by the specs' own validation. Everything is deterministic.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conformance.variants import variants
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.site import initialise
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.spec import validate

VOCABULARY, CONTEXT = 61, 64
SIZES: dict[str, Any] = {"width": 32, "depth": 2, "vocabulary": VOCABULARY, "context": CONTEXT}
FORMS: dict[str, dict[str, Any]] = {
    "decoder": {},
    "encoder": {"causal": False},
    "encoder_decoder": {"encoder": {"depth": 1}},
}
FAMILIES = ("attention", "position", "ffn", "residual", "norm", "block", "embedding", "head", "linear", "stack")
"""Families a Transformer is made of; `scaling` comes with position."""


@functools.cache
def axes() -> dict[str, dict[str, dict[str, Any]]]:
    """Axis -> value -> the fields of the model that it sets."""
    made: dict[str, dict[str, dict[str, Any]]] = {"form": FORMS}
    for family in FAMILIES:
        made[family] = {}
        for name, fields in variants(family).items():
            if family == "attention":
                fields = {"heads": 4, **fields}
            made[family][name] = {family: fields}
    return made


@functools.cache
def usual() -> dict[str, str]:
    """The value of each axis that the defaults of the model spec choose."""
    spec = TransformerSpec()
    return {"form": "decoder", **{family: getattr(spec, family).kind for family in FAMILIES}}


@dataclass(frozen=True)
class Case:
    """One tiny model: the chosen value of each axis."""

    choice: tuple[str, ...]

    @classmethod
    def of(cls, **choice: str) -> Case:
        """The usual model with these choices."""
        return cls(tuple(choice.get(axis, value) for axis, value in usual().items()))

    @property
    def chosen(self) -> dict[str, str]:
        return dict(zip(usual(), self.choice, strict=True))

    def __str__(self) -> str:
        """What is not usual, or all of it."""
        named = [value for (axis, value), default in zip(self.chosen.items(), usual().values(), strict=True)
                 if value != default]  # fmt: skip
        return "-".join(named) or "usual"

    @property
    def form(self) -> str:
        return self.chosen["form"]

    @property
    def decodes(self) -> bool:
        """Whether it has a decoder fed with token ids."""
        return self.form != "encoder" and self.of_tokens

    @property
    def of_tokens(self) -> bool:
        return self.spec().embedding.of_tokens

    def data(self, **fields: Any) -> dict[str, Any]:
        """Fields of the model."""
        data = dict(SIZES)
        for axis, value in self.chosen.items():
            data.update(axes()[axis][value])
        return {**data, **fields}

    def spec(self, **fields: Any) -> TransformerSpec:
        """The model spec.

        Raises:
            TorchstoneError: the choices do not go together.
        """
        return _spec(self) if not fields else validate(TransformerSpec, self.data(**fields))

    def why_illegal(self) -> str | None:
        """The sentence by which the specs refuse it, or None."""
        try:
            self.spec()
        except TorchstoneError as error:
            return str(error)
        return None

    def model(self, seed: int = 0, noise: float = 0.2, **fields: Any) -> Transformer:
        """The model in the default dtype, its parameters keyed by `seed`.

        `noise` is added to every parameter: from the usual start (deviation 0.02, zero biases, unit gains) all
        scores are nearly equal and a wrong mask or a missing bias would hardly show.
        """
        model = initialise(self.spec(**fields).build(), seed)
        if noise:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    generator = Key(seed).fold("noise", name).generator()
                    drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_((noise * drawn).to(parameter.dtype))
        return model


@functools.cache
def _spec(case: Case) -> TransformerSpec:
    return validate(TransformerSpec, case.data())


Pair = tuple[tuple[str, str], tuple[str, str]]
"""A variant of one axis and a kind of another: (axis, value), (axis, kind)."""


@functools.cache
def kind_of(axis: str, value: str) -> str:
    """The kind that a value of an axis is a variant of."""
    return value if axis == "form" else str(axes()[axis][value][axis]["kind"])


def pairs_of(chosen: Mapping[str, str]) -> set[Pair]:
    """All pairs of a variant and a kind in one choice."""
    return {((a, x), (b, kind_of(b, y))) for (a, x), (b, y) in itertools.permutations(chosen.items(), 2)}


def all_pairs() -> list[Pair]:
    """Every variant of every axis with every kind of every other."""
    kinds = {axis: list(dict.fromkeys(kind_of(axis, value) for value in values)) for axis, values in axes().items()}
    return [((a, x), (b, k)) for a, b in itertools.permutations(kinds, 2) for x in axes()[a] for k in kinds[b]]


IMPOSSIBLE = Path(__file__).with_name("impossible.json")
"""Pairs that no model can have, by the sentence that refuses them: looking for a model that has one takes long and ends
with none. Pairs that it lacks are looked for, so a new kind needs no entry."""


def written(pair: Pair) -> str:
    return " with ".join(" ".join(item) for item in pair)


@functools.cache
def impossible() -> dict[Pair, str]:
    """What is said in the file, of the pairs that there are."""
    sentences = {pair: why for why, pairs in json.loads(IMPOSSIBLE.read_text()).items() for pair in pairs}
    return {pair: sentences[written(pair)] for pair in all_pairs() if written(pair) in sentences}


@functools.cache
def covering() -> tuple[tuple[Case, ...], dict[Pair, str]]:
    """Cases in which every variant meets every kind of the other families, where that is legal, and the pairs that no
    model can have, with a sentence each. That every variant meets every other variant is for the slow product."""
    cases, illegal = cover([pair for pair in all_pairs() if pair not in impossible()])
    return cases, impossible() | illegal


def cover(pairs: Sequence[Pair]) -> tuple[tuple[Case, ...], dict[Pair, str]]:
    """Cases in which these pairs are, and those of them that are in none, with a sentence each.

    Greedy: for the first pair not covered, of many completions the legal one that covers most uncovered pairs.
    """
    table = {axis: list(values) for axis, values in axes().items()}
    uncovered, illegal, cases, rng = set(pairs), {}, [], random.Random(0)
    for pair in pairs:
        if pair not in uncovered:
            continue
        (a, x), (b, kind) = pair
        alike = [value for value in table[b] if kind_of(b, value) == kind]
        best, reason = None, ""
        for attempt in range(200):
            fixed = {a: x, b: alike[attempt] if attempt < len(alike) else rng.choice(alike)}
            chosen = {axis: rng.choice(values) for axis, values in table.items()} if attempt else dict(usual())
            if attempt % 3 == 2:  # usual but for two choices, where one thing calls for another
                chosen = {**usual(), **{axis: chosen[axis] for axis in rng.sample(list(table), 2)}}
            chosen |= fixed
            if attempt % 2:  # choices that meet an uncovered pair with the fixed ones first
                for axis, values in table.items():
                    wanted = [v for v in values if axis not in fixed and _new(fixed, axis, v, uncovered)]
                    if wanted:
                        chosen[axis] = rng.choice(wanted)
            gain = len(pairs_of(chosen) & uncovered)
            if best is not None and gain <= best[0]:
                continue
            case = Case(tuple(chosen[axis] for axis in table))
            why = case.why_illegal()
            if why is None:
                best = (gain, case)
            else:
                reason = reason or why
            if best is not None and attempt >= 20:
                break
        if best is None:
            illegal[pair] = reason
            uncovered.discard(pair)
        else:
            cases.append(best[1])
            uncovered -= pairs_of(best[1].chosen)
    return tuple(cases), illegal


def _new(fixed: Mapping[str, str], axis: str, value: str, uncovered: set[Pair]) -> bool:
    return any(
        ((a, x), (axis, kind_of(axis, value))) in uncovered or ((axis, value), (a, kind_of(a, x))) in uncovered
        for a, x in fixed.items()
    )


@functools.cache
def first_cases() -> frozenset[Case]:
    """Some of the covering cases, in which every variant is: what runs at every change. That kinds which go together
    meet too is for the rest, in the slow tier."""
    return fewest(covering()[0], lambda case: set(case.chosen.items()))


def fewest(cases: Iterable[Case], has: Callable[[Case], set[tuple[str, str]]]) -> frozenset[Case]:
    """A few of the cases that have everything that all have. Greedy."""
    items = {case: has(case) for case in cases}
    left, chosen = set().union(*items.values()), []
    while left:
        chosen.append(max(items, key=lambda case: len(left & items[case])))
        left -= items[chosen[-1]]
    return frozenset(chosen)


def singles() -> list[Case]:
    """One case for each variant of each family, all else usual where that is legal."""
    found = {}
    for axis, values in axes().items():
        for value in values:
            case = Case.of(**{axis: value})
            if case.why_illegal() is not None:  # patches have no matrix to tie to
                case = next(c for c in covering()[0] if c.chosen[axis] == value)
            found[case] = None
    return list(found)
