"""What the claims' functions find exact, and that each defect is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchstone.model.site import Site, initialise
from torchstone.objectives import Facts
from torchstone.objectives.multi_token import MultiTokenSpec
from torchstone.papers import find_paper
from torchstone.papers.deepseek_v3 import BackwardsSpec, OffByOneSpec, UnscaledSpec, _batch, _errors, _model


@pytest.mark.slow
def test_the_identities_hold() -> None:
    claim = find_paper("deepseek-v3").claim("exact")
    assert claim is not None and claim.run is not None
    numbers = claim.run("quick", 0).numbers
    assert {gate.name: gate.answer(numbers, {}) for gate in claim.gates} == {gate.name: "holds" for gate in claim.gates}


def test_errors_of_products_are_within_the_gates() -> None:
    claim = find_paper("deepseek-v3").claim("eight-bits")
    assert claim is not None
    found = _errors(0)
    assert [gate.answer(found, {}) for gate in claim.gates[1:]] == ["holds"] * 3
    # numbers of 8 bits are floats: beside a channel 10^3 times as large one scale for all is hardly worse
    ratio = [found[f"error beside a channel 10^3 times as large, {how}"] for how in ("one scale for all", "tiles")]
    assert ratio[0] < 1.1 * ratio[1]


def test_the_backward_bias_prefers_the_fullest_expert() -> None:
    router: Any = initialise(BackwardsSpec(update_rate=0.1).build(Site(width=8), 3, 1), 0)
    router.after_step(0, {"load.0": torch.tensor([9.0, 2.0, 1.0])})
    torch.testing.assert_close(router.bias, torch.tensor([0.1, -0.1, -0.1]))


def test_the_module_off_by_one_trains_on_its_own_token() -> None:
    model, batch = _model(1, 0), _batch(0, rows=1, length=6)
    other = {**batch, "ids": batch["ids"].clone()}
    other["ids"][0, -1] += 1  # read by the module of the last position but one, or by none that has a target
    for spec, changes in ((MultiTokenSpec(), True), (OffByOneSpec(), False)):
        a, b = (spec.build(Facts())(model, each, None).terms["mtp_1"].total for each in (batch, other))
        assert bool((a - b).abs() > 1e-5 * a) == changes


def test_gradients_without_a_scale_vanish() -> None:
    def normal(weight: torch.Tensor, role: str, generator: torch.Generator) -> None:
        weight.normal_(generator=generator)

    made: Any = initialise(UnscaledSpec().build(16, (8,), ("up",), False, normal), 0)
    made(torch.ones(4, 16)).backward(torch.full((4, 8), 2.0**-11))
    assert not made.weight.grad.any()
    made(torch.ones(4, 16)).backward(torch.full((4, 8), 2.0**-8))
    assert made.weight.grad.all()
