"""GShard's experts: who gets a second expert, who is left out when experts are full, and what then counts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.context import Context
from torchstone.model.feedforward.gshard import GShard, GShardSpec
from torchstone.model.site import Site, initialise
from torchstone.model.tokens import Tokens
from torchstone.model.transformer import TransformerSpec
from torchstone.spec import validate

D, E, B, T = 16, 4, 5, 40
X = torch.randn(B, T, D, generator=Key(1).generator())


def made(**fields: Any) -> GShard:
    spec = validate(GShardSpec, {"experts": E, "hidden": 8, **fields})
    module = initialise(spec.build(Site(width=D)), 0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=Key(2).fold(name).generator()))
    return module  # type: ignore[return-value]


def routed(router: dict[str, Any], key: int | None = 7, active: int = 2) -> tuple[Any, torch.Tensor]:
    """The routing and the probabilities that it goes by."""
    module = made(router={"kind": "gshard", **router}, active=active)
    ctx = Context.alone(X) if key is None else replace(Context.alone(X), key=torch.tensor(key))
    return module.router(X, ctx), module.router.score(X, ctx)


def test_always_takes_the_next_best_and_evaluation_does_so_whatever_the_policy() -> None:
    for router, key in (({"second": "always"}, 7), ({"second": "random"}, None), ({"second": "sampling"}, None)):
        routing, scores = routed(router, key)
        gates, experts = scores.topk(2)
        assert torch.equal(routing.experts, experts) and torch.equal(routing.gates, gates)


def test_random_keeps_a_second_expert_with_twice_its_gate_as_probability() -> None:
    kept, wanted = 0.0, 0.0
    for key in range(30):
        routing, scores = routed({"second": "random"}, key)
        best = scores.topk(2).values
        assert torch.equal(routing.gates[..., 0], best[..., 0])
        second = routing.gates[..., 1]
        assert bool(((second == 0) | (second == best[..., 1])).all())
        kept += float((second > 0).float().sum())
        wanted += float((2 * best[..., 1].detach()).clamp(max=1).sum())
    assert abs(kept - wanted) < 4 * math.sqrt(wanted)  # 6,000 draws


def test_sampling_draws_the_second_from_the_others_in_proportion() -> None:
    drawn = torch.zeros(B, T, E)
    for key in range(200):
        routing, scores = routed({"second": "sampling"}, key)
        assert torch.equal(routing.experts[..., 0], scores.argmax(-1))
        assert bool((routing.experts[..., 0] != routing.experts[..., 1]).all())
        drawn.scatter_add_(-1, routing.experts[..., 1:], torch.ones(B, T, 1))
    others = scores.scatter(-1, scores.argmax(-1, keepdim=True), 0.0)
    others = others / others.sum(-1, keepdim=True)
    assert float((drawn / 200 - others).abs().mean()) < 0.03  # a share of 200 draws is off by some 0.02


def test_the_balance_loss_is_its_weight_where_gates_and_choices_are_uniform() -> None:
    module: Any = made(router={"kind": "gshard", "balance": 0.01}, active=1)
    module.router.weight.data.zero_()
    x = torch.zeros(1, E, D)
    routing = module.router(x, Context.alone(x))
    even = replace(routing, experts=torch.arange(E).view(1, E, 1))
    valid = torch.ones(1, E, dtype=torch.bool)
    loss = module.router.losses(torch.full((1, E, E), 1 / E), even, valid, Context.alone(x))["balance_loss"]
    assert float(loss / E) == pytest.approx(0.01)
    full = module.router.losses(
        torch.eye(E)[torch.zeros(1, E, dtype=torch.long)], replace(routing, experts=torch.zeros(1, E, 1).long()), valid,
        Context.alone(x),
    )["balance_loss"]  # fmt: skip
    assert float(full / E) == pytest.approx(0.01 * E)


@pytest.mark.parametrize("key", [7, None])
def test_no_expert_takes_more_than_its_room_and_first_choices_come_first(key: int | None) -> None:
    fields = {"capacity": 0.6, "eval_capacity": 0.2, "router": {"kind": "gshard", "second": "always"}}
    module: Any = made(**fields)
    ctx = Context.alone(X) if key is None else replace(Context.alone(X), key=torch.tensor(key))
    chosen = module.router(X, ctx).experts
    taken, aux = module._taken(chosen, ctx)
    room = math.ceil(0.2 * B * T) if key is None else math.ceil(0.6 * 2 * B * T / E)
    left = [room] * E
    for k in range(2):
        for t in range(T):
            for b in range(B):
                e = int(chosen[b, t, k])
                assert int(taken[b, t, k]) == (e if left[e] > 0 else E)
                left[e] -= 1
    assert bool((taken == E).any()) and ("dropped" in aux) == (key is not None)


def test_a_token_that_lost_one_expert_has_all_of_the_other_where_gates_are_made_anew() -> None:
    fields = {"eval_capacity": 0.3, "router": {"kind": "gshard", "second": "always"}, "activation": "relu"}
    with torch.no_grad():
        module: Any = made(renormalise=True, **fields)
        routing = module.router(X, Context.alone(X))
        taken, _ = module._taken(routing.experts, Context.alone(X))
        found = module(X, Context.alone(X))[0]
        w1, w2 = module.up.weight.view(E, 8, D), module.down.weight.view(E, D, 8)
        b1, b2 = module.up_bias.weight.view(E, 8), module.down_bias.weight.view(E, D)
        seen = set()
        for b in range(B):
            for t in range(T):
                kept = [k for k in range(2) if taken[b, t, k] < E]
                gates = {int(taken[b, t, k]): float(routing.gates[b, t, k]) for k in kept}
                total = sum(gates.values())
                y = torch.zeros(D)
                for e, gate in gates.items():
                    y = y + gate / total * (w2[e] @ (w1[e] @ X[b, t] + b1[e]).relu() + b2[e])
                torch.testing.assert_close(found[b, t], y, rtol=1e-4, atol=1e-4)
                seen.add(len(kept))
    assert seen >= {1, 2}


def test_padding_takes_no_place() -> None:
    module: Any = made(eval_capacity=0.05)
    valid = torch.arange(T)[None] >= torch.tensor([T - 2] * B)[:, None]
    ctx = replace(Context.alone(X), q=Tokens.blank(T, valid=valid))
    taken, _ = module._taken(module.router(X, ctx).experts, ctx)
    assert bool((taken[:, : T - 2] == E).all()) and bool((taken[:, T - 2 :, 0] < E).any())


@pytest.mark.parametrize("router", [{"second": "random"}, {"second": "sampling", "rank": 3}, {"second": "always"}])
def test_it_learns(router: dict[str, Any]) -> None:
    module = made(router={"kind": "gshard", **router}, renormalise=True, capacity=1.0)
    ctx = replace(Context.alone(X), key=torch.tensor(3))
    y, aux = module(X, ctx)
    (y.square().mean() + aux["balance_loss"][0] / aux["balance_loss"][1]).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert float(parameter.grad.abs().max()) > 0, name


def test_a_third_expert_is_refused() -> None:
    body = {"vocabulary": 9, "width": 8, "attention": {"heads": 2}, "ffn": {"kind": "gshard", "active": 3}}
    with pytest.raises(TorchstoneError) as caught:
        validate(TransformerSpec, body)
    assert str(caught.value) == "ffn.router.second: 3 active experts, and gshard chooses one or two"
