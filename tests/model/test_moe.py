"""A layer of experts: what its papers promise, who is dropped beyond a capacity, and what it costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import torchstone
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.context import Context
from torchstone.model.feedforward.moe import MoE, MoESpec
from torchstone.model.linear import LinearBank
from torchstone.model.site import Site, initialise
from torchstone.model.taps import Taps
from torchstone.model.tokens import Tokens
from torchstone.spec import validate

pytestmark = pytest.mark.usefixtures("float64")
D, V = 16, 40


def layer(**fields: Any) -> MoE:
    spec = validate(MoESpec, {"experts": 4, "active": 2, "hidden": 8, **fields})
    assert spec.illegal(None, D) is None  # type: ignore[arg-type]
    module = initialise(spec.build(Site(width=D, vocabulary=V)), 0)
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            noise = torch.randn(parameter.shape, generator=Key(number).generator(), dtype=torch.float64)
            parameter.add_(0.4 * noise)
    return module  # type: ignore[return-value]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=Key(seed).fold(*shape).generator(), dtype=torch.float64)


def context(rows: int, length: int, **columns: Any) -> Context:
    ids = torch.randint(V, (rows, length), generator=Key(3).generator())
    key = columns.pop("key", None)
    taps = columns.pop("taps", None)
    tokens = Tokens.of(ids, **columns)
    return Context(tokens, tokens, key=key, taps=taps)


# ------------------------------------------------------------------------------------------------------ identities


def test_one_network_cut_into_experts_that_all_count_one_is_that_network() -> None:
    gate, up, down = drawn(24, D, seed=1), drawn(24, D, seed=2), drawn(D, 24, seed=3)
    x = drawn(2, 5, D)
    wanted = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    module = layer(experts=4, active=4, hidden=6)
    with torch.no_grad():
        pieces = zip(gate.split(6), up.split(6), strict=True)
        module.up.weight.copy_(torch.cat([torch.cat(pair) for pair in pieces]))
        module.down.weight.copy_(torch.cat(down.split(6, 1)))
    ctx = context(2, 5, taps=Taps(replace={"router.gates": torch.ones_like}))
    torch.testing.assert_close(module(x, ctx)[0], wanted)


def test_experts_cut_finer_have_as_many_parameters_but_for_the_router() -> None:
    """(N, K), (m N, m K) and m N - S with S shared, of a width m times smaller."""
    whole, fine = layer(experts=4, active=2, hidden=12), layer(experts=12, active=6, hidden=4)
    shared = layer(experts=10, active=4, hidden=4, shared=2)
    sizes, active = [], []
    for module in (whole, fine, shared):
        router = sum(p.numel() for p in module.router.parameters())
        total = sum(p.numel() for p in module.parameters())
        assert router == D * module.spec.experts
        sizes.append(total - router)
        active.append(total - router - module.inactive_parameters)
    assert sizes == [4 * 3 * D * 12] * 3 and active == [2 * 3 * D * 12] * 3


def test_tokens_in_another_order_get_the_same() -> None:
    module, x = layer(), drawn(1, 9, D)
    order = torch.randperm(9, generator=Key(1).generator())
    torch.testing.assert_close(module(x[:, order])[0], module(x)[0][:, order], rtol=0, atol=1e-12)


def test_the_same_choice_played_again_changes_no_bit_and_gates_stay_live() -> None:
    module, x = layer(shared=1), drawn(2, 7, D)
    seen = Taps(record=["router.*"])
    y = module(x, context(2, 7, taps=seen))[0]
    experts = seen.seen["router.experts"]
    again = module(x, context(2, 7, taps=Taps(replace={"router.experts": experts})))[0]
    assert torch.equal(again, y)
    forced = torch.tensor([3, 1]).expand(2, 7, 2)
    played = Taps(record=["router.gates", "router.scores"], replace={"router.experts": forced})
    module(x, context(2, 7, taps=played))[0].sum().backward()
    torch.testing.assert_close(played.seen["router.gates"], played.seen["router.scores"].gather(-1, forced))
    assert module.router.weight.grad.abs().sum() > 0
    swapped = module(x, context(2, 7, taps=Taps(replace={"router.experts": forced.flip(-1)})))[0]
    straight = module(x, context(2, 7, taps=Taps(replace={"router.experts": forced})))[0]
    torch.testing.assert_close(swapped, straight, rtol=0, atol=1e-12)


def test_counts_under_replay_are_those_of_what_is_played() -> None:
    forced = torch.tensor([3, 1]).expand(2, 7, 2)
    aux = layer()(drawn(2, 7, D), context(2, 7, taps=Taps(replace={"router.experts": forced})))[1]
    assert aux[":load.0"][0].tolist() == [0, 14, 0, 14]


# -------------------------------------------------------------------------------------------------- counts and drops


def test_load_statistics_are_those_of_valid_tokens() -> None:
    module, x = layer(), drawn(2, 7, D)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[0, 4:] = False
    taps = Taps(record=["router.experts"])
    aux = module(x, context(2, 7, valid=valid, taps=taps))[1]
    chosen = taps.seen["router.experts"][valid].flatten()
    load = torch.bincount(chosen, minlength=4).double()
    assert aux[":load.0"][0].tolist() == load.tolist()
    assert aux["load_max"][0].item() == pytest.approx(load.max().item() / load.mean().item())
    share = load[load > 0] / load.sum()
    assert aux["load_entropy"][0].item() == pytest.approx(-(share * share.log()).sum().item() / math.log(4))
    assert all(name in aux for name in ("balance_loss",)) and "dropped" not in aux
    module.eval()
    assert module(x, context(2, 7))[1] == {}


def test_padding_is_given_to_no_expert() -> None:
    module, x = layer(), drawn(1, 6, D)
    valid = torch.tensor([[True] * 4 + [False] * 2])
    y = module(x, context(1, 6, valid=valid))[0]
    assert not y[:, 4:].any() and y[:, :4].abs().min() > 0
    poisoned = torch.where(valid[..., None], x, 1e6)
    torch.testing.assert_close(module(poisoned, context(1, 6, valid=valid))[0], y, rtol=0, atol=1e-12)


def dropped_by_hand(experts_BTK: torch.Tensor, valid_BT: torch.Tensor, E: int, capacity: float) -> torch.Tensor:
    """Choices in the order of columns, then rows, then rank; each expert takes the first so many."""
    B, T, K = experts_BTK.shape
    room = math.ceil(capacity * K * int(valid_BT.sum()) / E)
    taken, over = [0] * E, torch.zeros(B, T, K, dtype=torch.bool)
    for t in range(T):
        for b in range(B):
            for k in range(K):
                e = int(experts_BTK[b, t, k])
                if valid_BT[b, t]:
                    over[b, t, k] = taken[e] >= room
                    taken[e] += 1
    return over


@pytest.mark.parametrize("capacity", [0.3, 0.8, 1.0])
def test_beyond_its_capacity_an_expert_drops_the_tokens_that_come_last(capacity: float) -> None:
    module, x = layer(capacity=capacity, experts=5, active=2), drawn(3, 11, D)
    valid = torch.rand(3, 11, generator=Key(2).generator()) < 0.8
    taps = Taps(record=["router.*"])
    y, aux = module(x, context(3, 11, valid=valid, taps=taps, key=Key(1).tensor()))
    experts = taps.seen["router.experts"]
    over = dropped_by_hand(experts, valid, 5, capacity)
    assert over.any() and aux["dropped"][0] == over.sum() and aux["dropped"][1] == 2 * valid.sum()
    assert aux[":load.0"][0].sum() == 2 * valid.sum()  # what was chosen, dropped or not
    gates = torch.where(over | ~valid[..., None], 0.0, taps.seen["router.gates"])
    up, down = module.up.weight.unflatten(0, (5, -1)), module.down.weight.unflatten(0, (5, -1))
    gate, inner = (up @ x[..., None, :, None])[..., 0].chunk(2, -1)
    every = (down @ (F.silu(gate) * inner)[..., None])[..., 0]
    wanted = (gates[..., None] * every.gather(2, experts[..., None].expand(-1, -1, -1, D))).sum(2)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-10)


def test_no_token_is_dropped_for_one_that_comes_after_it() -> None:
    module, x, key = layer(capacity=0.6), drawn(3, 11, D), Key(1).tensor()
    y = module(x, context(3, 11, key=key))[0]
    other = torch.cat([x[:, :6], drawn(3, 5, D, seed=9)], 1)
    torch.testing.assert_close(module(other, context(3, 11, key=key))[0][:, :6], y[:, :6], rtol=0, atol=1e-12)


def test_without_a_key_or_with_room_for_all_nothing_is_dropped() -> None:
    module, free, x = layer(capacity=0.3), layer(), drawn(2, 9, D)
    assert torch.equal(module(x, context(2, 9))[0], free(x, context(2, 9))[0])
    roomy = layer(capacity=4.0)
    y, aux = roomy(x, context(2, 9, key=Key(1).tensor()))
    assert aux["dropped"][0] == 0 and torch.equal(y, free(x, context(2, 9))[0])


# ------------------------------------------------------------------------------------------------ the layer's place


def test_a_bank_starts_and_moves_slice_by_slice_as_separate_projections() -> None:
    site = Site(width=D)
    bank = site.bank(3, D, (5, 5), ("gate", "up"))
    assert isinstance(bank, LinearBank) and bank.slices == (5,) * 6 and bank.roles == ("gate", "up") * 3
    from torchstone.train.optimizers import named_parameters

    (named,) = named_parameters([("", bank)])
    assert named.hidden and named.slices == (5,) * 6


def test_it_works_in_somebody_elses_model() -> None:
    torch.set_default_dtype(torch.float32)
    part = torchstone.build(MoESpec(experts=4), width=64)
    assert part(torch.randn(2, 16, 64)).shape == (2, 16, 64)
    assert part.aux["load_max"][0] >= 1
    hashed = torchstone.build(validate(MoESpec, {"router": "hash"}), width=64)
    with pytest.raises(TorchstoneError, match="router hash: chooses by token ids, and this forward has none"):
        hashed(torch.randn(2, 16, 64))
    with pytest.raises(TorchstoneError, match="router stable: has a vector for each token id, and needs a vocabulary"):
        torchstone.build(validate(MoESpec, {"active": 1, "router": "stable"}), width=64)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "more active than there are": ({"experts": 2, "active": 3}, r"ffn.active: 3 active of 2 experts"),
    "groups": ({"experts": 8, "router": {"groups": 3}}, r"ffn.router.groups: 3 groups do not divide 8 experts"),
    "kept groups": ({"router": {"groups": 2, "keep_groups": 3}}, r"ffn.router.keep_groups: is 3, and there are 2"),
    "too few in groups": (
        {"experts": 8, "active": 4, "router": {"groups": 4, "keep_groups": 1}},
        r"ffn.router.keep_groups: 1 of 4 groups have 2 experts, fewer than 4 active",
    ),
    "a gate that is always 1": ({"active": 1, "router": {"normalise": True}}, "the router would learn nothing"),
    "stable takes one": ({"router": "stable"}, "ffn.router.active: router stable chooses one expert, not 2"),
    "misspelt": (
        {"router": {"kind": "sigmoid_bias", "scal": 2}},
        r"ffn.router: no field 'scal' \(did you mean 'scale'",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_go_together_is_one_sentence(what: str) -> None:
    fields, message = REFUSED[what]
    with pytest.raises(TorchstoneError, match=message):
        torchstone.build({"width": D, "vocabulary": V, "ffn": {"kind": "moe", **fields}})


def test_routers_by_ids_are_refused_where_there_are_none() -> None:
    fields = {"width": D, "causal": False, "embedding": "patch", "head": "classification", "position": "learned"}
    with pytest.raises(TorchstoneError, match="ffn moe: chooses by token ids, and embedding patch has none"):
        torchstone.build({**fields, "ffn": {"kind": "moe", "router": "hash"}})
