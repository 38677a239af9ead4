"""BitNet's claims that need no training, and the defects of the arms of the one that does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchstone.model.site import Site, initialise
from torchstone.papers import find_paper
from torchstone.papers._reproduce import run_claim
from torchstone.papers.bitnet import LateSpec, StuckSpec


@pytest.mark.parametrize("name", ["packed-is-trained", "energy"])
def test_claims_without_training_hold(name: str) -> None:
    claim = find_paper("bitnet").claim(name)
    assert claim is not None
    found = run_claim(claim)
    assert {row["answer"] for row in found.gates} == {"holds"}, found.numbers


def test_the_late_arm_is_a_plain_product_in_training_and_quantised_in_evaluation() -> None:
    m: Any = initialise(Site(width=16, linear_spec=LateSpec()).linear(16, 8, "up"), 0)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(m(x), torch.nn.functional.rms_norm(x, (16,), eps=1e-5) @ m.weight.T)
    torch.testing.assert_close(m.eval()(x), m.spec.input(x) @ m.spec.weight(m.weight).T)


def test_the_stuck_arms_weights_do_not_move() -> None:
    m: Any = initialise(Site(width=16, linear_spec=StuckSpec()).linear(16, 8, "up"), 0)
    x = torch.randn(3, 16, requires_grad=True, generator=torch.Generator().manual_seed(0))
    m(x).sum().backward()
    assert m.weight.grad is not None and not m.weight.grad.any() and x.grad is not None and x.grad.any()
