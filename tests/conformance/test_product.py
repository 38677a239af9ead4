"""The full product of the kinds of attention, position, residual and feed-forward: causality, and decoding equals one
forward. Variants of a kind meet those of the others in pairs, in the covering array."""

from __future__ import annotations

import itertools

import pytest

from conformance.cases import Case, axes
from conformance.checks import CHECKS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float64")]


def kinds(family: str) -> list[str]:
    """The first variant of each kind."""
    first: dict[str, str] = {}
    for name, fields in axes()[family].items():
        first.setdefault(fields[family]["kind"], name)
    return list(first.values())


@pytest.mark.parametrize("position", kinds("position"))
@pytest.mark.parametrize("attention", kinds("attention"))
def test_every_combination_is_causal_and_decodes_as_it_runs(attention: str, position: str) -> None:
    for residual, ffn in itertools.product(kinds("residual"), kinds("ffn")):
        case = Case.of(attention=attention, position=position, residual=residual, ffn=ffn)
        if case.why_illegal() is None:
            CHECKS["causality"][0](case)
            CHECKS["decoding"][0](case)
