"""X-MoE's claims that need no training, and the defect of the arms of those that do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchstone.model.context import Context
from torchstone.model.site import Site, initialise
from torchstone.papers import find_paper
from torchstone.papers._reproduce import run_claim
from torchstone.papers.x_moe import UnnormalisedSpec


@pytest.mark.parametrize("name", ["router-parameters", "no-pull"])
def test_claims_without_training_hold(name: str) -> None:
    claim = find_paper("x-moe").claim(name)
    assert claim is not None
    found = run_claim(claim)
    assert {row["answer"] for row in found.gates} == {"holds"}, found.numbers


def test_the_unnormalised_arm_follows_a_tokens_length() -> None:
    router: Any = initialise(UnnormalisedSpec(dim=3).build(Site(width=12), 8, 1), 0)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    ctx = Context.alone(x)
    e = router.weight / router.weight.norm(dim=-1, keepdim=True)
    scores = x @ router.down.T @ e.T
    torch.testing.assert_close(router.score(x, ctx), scores, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(router.score(3 * x, ctx), 3 * scores, rtol=1e-4, atol=1e-6)
    gates = (scores / 0.3).softmax(-1).amax(-1, keepdim=True)
    torch.testing.assert_close(router(x, ctx).gates, gates, rtol=1e-4, atol=1e-6)
