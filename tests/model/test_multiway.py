"""A network for each modality: equal to routing by hand, forwards and backwards; what one kind of input gives does not
depend on the networks of others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.context import Context
from torchstone.model.feedforward.mlp import MLPSpec
from torchstone.model.feedforward.multiway import MultiwaySpec
from torchstone.model.measure import measure
from torchstone.model.site import Site, initialise
from torchstone.model.tokens import Tokens
from torchstone.model.transformer import TransformerSpec
from torchstone.spec import validate

D, F, E = 12, 20, 3
MODALITY = torch.tensor([[0, 0, 2, 2, 2, 0, 2], [2, 0, 0, 0, 0, 2, 2]])  # none is of modality 1


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=Key(seed).generator())


def made(**fields: Any) -> Any:
    module = validate(MultiwaySpec, {"modalities": E, "hidden": F, **fields}).build(Site(width=D))
    initialise(module, 1)
    for bias in (module.up_bias, module.down_bias):
        if bias is not None:
            assert not bias.any()
            bias.data.copy_(drawn(2, *bias.shape))
    return module


def alone(module: Any, k: int) -> Any:
    """The network of modality k as a plain feed-forward."""
    bias = module.up_bias is not None
    plain: Any = MLPSpec(hidden=F, bias=bias).build(Site(width=D))
    weights = {"up.weight": module.up.weight.view(E, F, D)[k], "down.weight": module.down.weight.view(E, D, F)[k]}
    if bias:
        weights |= {"up.bias": module.up_bias.view(E, F)[k], "down.bias": module.down_bias.view(E, D)[k]}
    plain.load_state_dict({name: weight.detach() for name, weight in weights.items()})
    return plain


def of(x: torch.Tensor, modality: torch.Tensor | None) -> Context:
    return replace(Context.alone(x), q=Tokens.of(torch.zeros(x.shape[:2], dtype=torch.int64), modality=modality))


@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_routing_by_hand(bias: bool) -> None:
    module = made(bias=bias)
    x, y = (drawn(3, 2, 7, D).requires_grad_() for _ in range(2))
    found = module(x, of(x, MODALITY))[0]
    networks = [alone(module, k) for k in range(E)]
    wanted = torch.zeros(2, 7, D)
    for k, network in enumerate(networks):
        at = (k == MODALITY).nonzero(as_tuple=True)
        wanted = wanted.index_put(at, network(y[at][None])[0][0])
    torch.testing.assert_close(found, wanted)
    weight = drawn(4, 2, 7, D)
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for name in ("up", "down"):
        hand = torch.cat([getattr(network, name).weight.grad for network in networks])
        torch.testing.assert_close(getattr(module, name).weight.grad, hand)
        if bias:
            hand = torch.cat([getattr(network, name).bias.grad for network in networks])
            torch.testing.assert_close(getattr(module, f"{name}_bias").grad, hand)


@torch.no_grad()
def test_without_a_column_and_with_equal_networks_it_is_a_plain_feed_forward() -> None:
    module, x = made(bias=True), drawn(3, 2, 7, D)
    zeros = torch.zeros(1, 7, dtype=torch.int64)  # one row for all
    first = alone(module, 0)(x)[0]
    for ctx in (None, of(x, None), of(x, zeros)):
        torch.testing.assert_close(module(x, ctx)[0], first)
    for parameter in module.parameters():
        parameter.copy_(parameter.view(E, -1)[:1].expand(E, -1).reshape(parameter.shape))
    torch.testing.assert_close(module(x, of(x, MODALITY))[0], alone(module, 0)(x)[0])


@torch.no_grad()
def test_what_a_model_says_of_one_kind_of_input_does_not_depend_on_the_networks_of_others() -> None:
    fields = {"width": D, "depth": 2, "vocabulary": 9, "attention": {"heads": 2}, "ffn": {"kind": "multiway"}}
    model: Any = validate(TransformerSpec, fields).build()
    initialise(model, 1)
    ids = torch.arange(14).view(2, 7) % 9
    ones, mixed = torch.ones_like(ids), MODALITY.clamp(max=1)
    texts, both = (model(Tokens.of(ids, modality=m)).logits for m in (ones, mixed))
    for layer in model.decoder.layers:
        layer.ffn.up.weight[: 4 * D] += 1.0
    assert torch.equal(model(Tokens.of(ids, modality=ones)).logits, texts)
    again = model(Tokens.of(ids, modality=mixed)).logits
    # the first row begins with modality 0; the second with one token of modality 1, which sees itself alone
    assert not torch.equal(again[0, 0], both[0, 0]) and torch.equal(again[1, 0], both[1, 0])
    assert not torch.equal(again[1, -1], both[1, -1])  # by what it attends to


def test_a_token_meets_one_network_whatever_their_number() -> None:
    def counts(**ffn: Any) -> Any:
        fields = {"width": D, "depth": 2, "vocabulary": 9, "attention": {"heads": 2}, "ffn": ffn}
        return measure(validate(TransformerSpec, fields).build())

    one, four = counts(kind="mlp", bias=True), counts(kind="multiway", modalities=4, bias=True)
    assert one.active_parameters == four.active_parameters and one.flops_per_token == four.flops_per_token
    assert four.parameters - one.parameters == 3 * 2 * (8 * D * D + 5 * D)


@pytest.mark.parametrize(("wrong", "said"), [(3, 3), (-1, -1)])
def test_a_modality_without_a_network_is_refused(wrong: int, said: int) -> None:
    module, x = made(), drawn(3, 2, 7, D)
    with pytest.raises(TorchstoneError) as caught:
        module(x, of(x, torch.where(MODALITY == 2, wrong, MODALITY)))
    assert str(caught.value) == f"ffn multiway: no network for modality {said}; there are 3, from 0"
