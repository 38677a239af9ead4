"""X-MoE's claims that need no training, and the defect of the arms of those that do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchstone.model.context import Context
from torchstone.model.feedforward.router.cosine import CosineSpec
from torchstone.model.site import Site, initialise
from torchstone.papers import find_paper
from torchstone.papers._reproduce import run_claim
from torchstone.papers.x_moe import MultipliedSpec, SampledSpec


@pytest.mark.parametrize("name", ["router-parameters", "no-pull"])
def test_claims_without_training_hold(name: str) -> None:
    claim = find_paper("x-moe").claim(name)
    assert claim is not None
    found = run_claim(claim)
    assert {row["answer"] for row in found.gates} == {"holds"}, found.numbers


def _router(spec: type[CosineSpec]) -> Any:
    return initialise(spec(dim=3).build(Site(width=12), 8, 1), 0)


def test_the_sampled_arm_draws_experts_by_their_gates() -> None:
    router, x = _router(SampledSpec).eval(), torch.randn(1, 1, 12, generator=torch.Generator().manual_seed(0))
    x = x.expand(1, 4000, 12)
    scores = router.score(x, Context.alone(x))[0, 0]
    torch.manual_seed(0)
    drawn = torch.bincount(router(x, Context.alone(x)).experts.flatten(), minlength=8) / 4000
    torch.testing.assert_close(drawn, (scores / 0.3).softmax(-1).detach(), rtol=0, atol=0.03)


def test_the_multiplied_arm_has_gates_that_are_nearly_alike() -> None:
    router, plain = _router(MultipliedSpec), _router(CosineSpec)
    x = torch.randn(1, 50, 12, generator=torch.Generator().manual_seed(0))
    routings = [module(x, Context.alone(x)) for module in (router, plain)]
    assert torch.equal(routings[0].experts, routings[1].experts)
    wanted = (0.3 * router.score(x, Context.alone(x))).softmax(-1).amax(-1, keepdim=True)
    torch.testing.assert_close(routings[0].gates, wanted)
    assert routings[0].gates.max() < 0.2 < routings[1].gates.max()
