"""DeepSeekMoE's claims that need no training, the task of the one that does, and its defect."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from torchstone.model.alone import alone
from torchstone.model.context import Context
from torchstone.model.feedforward.moe import MoESpec
from torchstone.papers import deepseekmoe, find_paper
from torchstone.papers._reproduce import run_claim
from torchstone.spec import validate


@pytest.mark.parametrize("name", ["sizes", "segmentation"])
def test_claims_without_training_hold(name: str) -> None:
    claim = find_paper("deepseekmoe").claim(name)
    assert claim is not None
    found = run_claim(claim)
    assert {row["answer"] for row in found.gates} == {"holds"}, found.numbers


def test_operations_are_those_of_the_tables_rule() -> None:
    """6 operations a weight, 12 l d s of attention, and C = M tokens (the accounting of DeepSeek LLM)."""
    found = deepseekmoe._sizes("quick", 0).numbers
    d, layers, T, vocabulary = 4096, 30, 4096, 102_400
    dense = (72 * layers * d**2 + 12 * layers * d * T + 6 * vocabulary * d) * T / 1e12
    assert found["10^12 operations of 4,096 tokens, 7b, dense"] == pytest.approx(dense, rel=1e-4)
    d, layers, whole = 2048, 28, 3 * 2048 * 8 * 2048 / 3
    weights = layers * 4 * d**2 + 27 * 8 * whole / 4 + 2 * whole + vocabulary * d
    sparse = (6 * weights + 12 * layers * d * T) * T / 1e12
    assert found["10^12 operations of 4,096 tokens, 16b, experts of 2/3 of the width"] == pytest.approx(
        sparse, rel=1e-3
    )
    assert round(100 * sparse / dense, 1) == pytest.approx(40.5, abs=0.11)


def test_targets_are_sums_of_the_common_and_of_four_skills() -> None:
    task = deepseekmoe.Skills(seed=3)
    (x, y), (again, _) = next(task.batches(512, 1)), next(task.batches(512, 1))
    assert torch.equal(x, again) and x.shape == y.shape == (512, 64)
    batches = task.batches(4, 1)
    assert not torch.equal(next(batches)[0], next(batches)[0])
    # with 16 skills of which 4 are chosen, keys span at most 16 dimensions and the rest of x 32
    assert torch.linalg.matrix_rank(x[:, 32:]) == 16 and torch.linalg.matrix_rank(x[:, :32]) == 32
    one = deepseekmoe.Skills(seed=3, chosen=1)
    keys = {tuple(row) for row in next(one.batches(512, 1))[0][:, 32:].tolist()}
    assert len(keys) == 16


def test_arms_are_of_one_size_but_for_routers_and_the_wide_one() -> None:
    sizes = {}
    for name in deepseekmoe._ARMS:
        part = deepseekmoe._arm(name, 0).part
        sizes[name] = sum(p.numel() for path, p in part.named_parameters() if not path.startswith("router."))
    wide = sizes.pop("gshard 1.5 times as wide")
    assert set(sizes.values()) == {2 * 8 * 64 * 64} and wide == 1.5 * sizes["gshard"]


def test_the_detached_router_chooses_alike_and_learns_from_the_balance_loss_alone() -> None:
    x = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(0))
    layers: list[Any] = [
        alone(validate(MoESpec, {"experts": 6, "hidden": 8, "router": {"kind": kind}}), 16, seed=1)
        for kind in ("topk", "topk_detached")
    ]
    outs = [layer(x) for layer in layers]
    assert torch.equal(*outs)
    weights = [layer.part.router.weight for layer in layers]
    for out, weight, learns in zip(outs, weights, (True, False), strict=True):
        grad = torch.autograd.grad(out.square().sum(), weight, allow_unused=True, retain_graph=True)[0]
        assert (grad is not None and bool(grad.any())) == learns
    routing = layers[1].part.router(x, Context.alone(x))
    assert torch.autograd.grad(routing.losses["balance_loss"], weights[1])[0].any()


def test_an_error_is_the_logarithm_of_a_share_of_the_variance() -> None:
    untrained, some = (deepseekmoe._trained("deepseekmoe", 0, 1e-2, steps) for steps in (1, 40))
    assert abs(untrained) < 0.2 and some < untrained - 0.05 and math.exp(some) > 0.1
