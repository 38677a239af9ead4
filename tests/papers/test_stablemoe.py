"""StableMoE's claims that need no long training, and the defect of the arm of the one that does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchstone.keys import Key
from torchstone.model.context import Context
from torchstone.model.site import Site, initialise
from torchstone.model.tokens import Tokens
from torchstone.papers import find_paper, stablemoe
from torchstone.papers._reproduce import run_claim
from torchstone.papers.stablemoe import AdriftSpec


@pytest.mark.parametrize("name", ["router-size", pytest.param("frozen-table", marks=pytest.mark.slow)])
def test_claims_without_long_training_hold(name: str) -> None:
    claim = find_paper("stablemoe").claim(name)
    assert claim is not None
    found = run_claim(claim)
    assert {row["answer"] for row in found.gates} == {"holds"}, found.numbers


def test_losses_move_what_they_should() -> None:
    assert set(stablemoe._losses(5).values()) == {0.0}


def test_the_router_adrift_is_evaluated_by_the_table_and_trained_by_scores() -> None:
    router: Any = initialise(AdriftSpec(distill_steps=1).build(Site(width=8, vocabulary=20), 4, 1), 0)
    tokens = Tokens.of(torch.randint(20, (2, 12), generator=Key(0).generator()))
    x, ctx = torch.randn(2, 12, 8, generator=Key(1).generator()), Context(tokens, tokens)
    router.before_step(1)
    assert router.frozen
    learned = (x @ router.weight.T).argmax(-1)
    table = (router.words @ router.distilled.T).argmax(-1)[tokens.ids]
    assert not torch.equal(learned, table)
    assert torch.equal(router(x, ctx).experts[..., 0], learned) and router(x, ctx).losses == {}
    assert torch.equal(router.eval()(x, ctx).experts[..., 0], table)
