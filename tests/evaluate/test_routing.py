"""What is said of a model's choices is what its routers chose."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torchstone
from torchstone.errors import TorchstoneError
from torchstone.evaluate import expert_choices, representation_collapse, routing_fluctuation


def model(**router: Any) -> Any:
    active = 1 if router["kind"] == "stable" else 2
    experts = {"kind": "moe", "experts": 4, "active": active, "hidden": 8, "router": router}
    return torchstone.build(
        {"width": 16, "depth": 2, "vocabulary": 30, "attention": {"heads": 2}, "ffn": experts, "residual": {"std": 0.5}}
    )


IDS = torch.arange(24).view(2, 12)


def test_choices_are_those_of_an_evaluation() -> None:
    moe = model(kind="stable")
    found = expert_choices(moe, IDS)
    assert list(found) == [f"decoder.layers.{i}.ffn.router" for i in range(2)] and moe.training
    for i, experts in enumerate(found.values()):
        router = moe.decoder.layers[i].ffn.router
        assert torch.equal(experts[..., 0], (router.words @ router.distilled.T).argmax(-1)[IDS])


def test_fluctuation_is_the_share_of_choices_that_changed() -> None:
    before = {"a": torch.tensor([[[0, 1], [2, 3], [1, 2]]])}
    after = {"a": torch.tensor([[[1, 0], [2, 1], [0, 3]]])}
    assert routing_fluctuation(before, after) == {"a": 0.5}
    assert routing_fluctuation(before, after, torch.tensor([[True, True, False]])) == {"a": 0.25}
    assert routing_fluctuation(after, after) == {"a": 0.0}
    with pytest.raises(TorchstoneError, match="not of the same layers"):
        routing_fluctuation(before, {"b": after["a"]})


def test_learned_choices_change_with_the_weights_and_frozen_ones_do_not() -> None:
    for kind, moves in (("topk", True), ("hash", False), ("stable", False)):
        moe = model(kind=kind)
        if kind == "stable":
            for layer in moe.decoder.layers:
                layer.ffn.router.before_step(10_000)
        before = expert_choices(moe, IDS)
        with torch.no_grad():
            for parameter in moe.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        assert any(routing_fluctuation(before, expert_choices(moe, IDS)).values()) == moves


def test_a_model_without_experts_is_refused() -> None:
    dense = torchstone.build({"width": 16, "depth": 1, "vocabulary": 30, "attention": {"heads": 2}})
    with pytest.raises(TorchstoneError, match="no layer of this model has a router"):
        expert_choices(dense, IDS)


def test_collapse_is_the_trace_of_covariances_within_experts_over_between_them() -> None:
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)).double()
    experts = torch.arange(60) % 7 % 3
    x[:, 0] += experts
    within, between = torch.zeros(5, 5).double(), torch.zeros(5, 5).double()
    for e in range(3):
        own = x[experts == e]
        within += len(own) / 60 * torch.cov(own.T, correction=0)
        step = own.mean(0) - x.mean(0)
        between += len(own) / 60 * torch.outer(step, step)
    torch.testing.assert_close(within + between, torch.cov(x.T, correction=0))
    values, vectors = torch.linalg.eigh(between)
    wanted = sum(float(v @ within @ v) / float(s) for s, v in zip(values[-2:], vectors.T[-2:], strict=True))
    assert representation_collapse(x, experts) == pytest.approx(wanted)
    # the same whatever the coordinates, and a ninth if the experts' means lie three times as far apart
    turned = 3 * x @ torch.linalg.qr(x[:5])[0]
    assert representation_collapse(turned, experts) == pytest.approx(wanted)
    means = torch.stack([x[experts == e].mean(0) for e in range(3)])[experts]
    assert representation_collapse(x + 2 * (means - x.mean(0)), experts) == pytest.approx(wanted / 9)
    with pytest.raises(TorchstoneError, match="all tokens have one expert"):
        representation_collapse(x, torch.ones(60))
