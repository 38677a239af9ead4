"""The full product of attention, position, residual and feed-forward: causality, and decoding equals one forward."""

from __future__ import annotations

import itertools

import pytest

from conformance.cases import Case, axes
from conformance.checks import CHECKS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float64")]


@pytest.mark.parametrize("position", axes()["position"])
@pytest.mark.parametrize("attention", axes()["attention"])
def test_every_combination_is_causal_and_decodes_as_it_runs(attention: str, position: str) -> None:
    for residual, ffn in itertools.product(axes()["residual"], axes()["ffn"]):
        case = Case.of(attention=attention, position=position, residual=residual, ffn=ffn)
        if case.why_illegal() is None:
            CHECKS["causality"][0](case)
            CHECKS["decoding"][0](case)
