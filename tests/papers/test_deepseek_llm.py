"""The published arithmetic holds, and the claims' arms are what their sentences say."""

from __future__ import annotations

import pytest

from torchstone.papers import find_paper
from torchstone.papers._reproduce import recipe_of, run_claim
from torchstone.papers.deepseek_llm import _STUDIES, _planted

PAPER = find_paper("deepseek-llm")


def test_the_laws_hold() -> None:
    outcome = run_claim(PAPER.claim("laws"))  # type: ignore[arg-type]
    assert {gate["gate"]: gate["answer"] for gate in outcome.gates} == {gate["gate"]: "holds" for gate in outcome.gates}


@pytest.mark.parametrize(
    ("arm", "rates"),
    [
        ("multi_step", {50: 1.0, 479: 1.0, 490: 0.316, 541: 0.316, 545: 0.1, 599: 0.1}),
        ("cosine", {599: 0.1}),
        ("falls_at_the_start", {70: 1.0, 78: 0.316, 90: 0.1, 599: 0.1}),
    ],
)
def test_rates_of_the_arms(arm: str, rates: dict[int, float]) -> None:
    recipe = recipe_of(PAPER.claim("multi-step-as-good"), "evidence", arm, None)  # type: ignore[arg-type]
    for step, rate in rates.items():
        assert recipe.schedule.factor(step, recipe.trainer.steps) == pytest.approx(rate)


def test_the_first_phase_does_not_depend_on_the_length_and_the_drops_are_shares_of_it() -> None:
    spec = recipe_of(PAPER.claim("multi-step-as-good"), "evidence", "multi_step", None).schedule  # type: ignore[arg-type]
    for short, long in ((600, 900), (600, 6000)):
        kept = spec.warmup + int(0.8 * (short - spec.warmup))
        assert all(spec.factor(step, short) == spec.factor(step, long) for step in range(kept))
    assert pytest.approx(0.1**0.5, abs=3e-4) == 0.316  # the paper's 31.6 %


def test_planted_losses_are_lowest_at_the_published_size() -> None:
    points = _planted(0.0, 0)[:10]
    best = min(points, key=lambda point: point.loss)
    assert best.flops_per_token == pytest.approx(0.1715 * best.compute**0.5243, rel=0.3)


def test_budgets_double_and_are_held_out_once() -> None:
    for name, study in _STUDIES.items():
        assert len(study.budgets) == 4 and len(study.widths) >= 3
        assert study.seeds >= (1 if name == "quick" else 5)
