"""Layers with projections and norms of each modality's own: plain layers where all are equal, whoever comes from where;
the same when decoded, recomputed, compiled and copied; a token meets the parameters of its own modality."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.measure import measure
from torchstone.model.site import initialise
from torchstone.model.tokens import Tokens
from torchstone.model.transformer import TransformerSpec
from torchstone.spec import validate

pytestmark = pytest.mark.usefixtures("float64")

V, T, E = 31, 9, 3
IDS = torch.randint(V, (2, T), generator=Key(1).generator())
MODALITY = torch.tensor([[0, 0, 2, 2, 1, 0, 2, 1, 1], [2, 1, 0, 0, 1, 2, 2, 0, 1]])
BASE: dict[str, Any] = {
    "width": 16,
    "depth": 2,
    "vocabulary": V,
    "context": 32,
    "attention": {"heads": 2, "bias": "all"},
    "ffn": {"kind": "mlp", "bias": True},
    "norm": "layernorm",
    "stack": {"kind": "multiway", "modalities": E},
}


def made(seed: int = 0, **fields: Any) -> Any:
    model = initialise(validate(TransformerSpec, {**BASE, **fields}).build(), seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=Key(seed).fold(name).generator())
        parameter.data.add_(0.2 * noise.double())
    return model


def tokens(modality: torch.Tensor = MODALITY) -> Tokens:
    return Tokens.of(IDS, modality=modality)


def of_one(model: Any, m: int, **fields: Any) -> Any:
    """The plain model that tokens of one modality alone would meet."""
    plain, weights = made(**{**fields, "stack": "plain"}), {}
    state = model.state_dict()
    for name, own in plain.state_dict().items():
        parts = name.split(".")
        if name not in state:  # a norm
            weights[name] = state[".".join([*parts[:-1], str(m), parts[-1]])]
        else:
            whole = state[name]
            weights[name] = whole if whole.shape == own.shape else whole.view(E, *own.shape)[m]
    plain.load_state_dict(weights)
    return plain


@pytest.mark.parametrize("m", range(E))
@pytest.mark.parametrize("residual", ["pre", "post", "subln", "deepnorm"])
def test_tokens_of_one_modality_meet_a_plain_model(residual: str, m: int) -> None:
    model = made(residual=residual, causal=False)
    found = model(tokens(torch.full((1, T), m)))
    torch.testing.assert_close(found.logits, of_one(model, m, residual=residual, causal=False)(IDS).logits)


@pytest.mark.parametrize("m", [0, 2])
def test_a_memory_has_modalities_of_its_own(m: int) -> None:
    model = made(encoder={"depth": 1})
    source = torch.randint(V, (2, 5), generator=Key(2).generator())
    memory = Tokens.of(source, modality=torch.full((1, 5), m))
    found = model(tokens(torch.full((1, T), m)), memory=memory).logits
    torch.testing.assert_close(found, of_one(model, m, encoder={"depth": 1})(IDS, memory=source).logits)
    other = model(tokens(torch.full((1, T), m)), memory=Tokens.of(source, modality=torch.full((1, 5), 1)))
    assert not torch.allclose(other.logits, found)


def test_token_by_token_it_is_one_forward() -> None:
    model = made()
    whole = model(tokens()).logits
    for static in (False, True):
        state = model.state(2, T, static=static)
        for t in range(T):
            step = Tokens.of(IDS[:, t : t + 1], modality=MODALITY[:, t : t + 1])
            torch.testing.assert_close(model(step, state=state).logits[:, 0], whole[:, t])


def gradients(model: Any, how: str) -> dict[str, torch.Tensor]:
    """Of two forwards with other modalities, both before the backward pass."""
    if how == "recomputed":
        model.decoder.recompute = True
    if how == "compiled":
        torch._dynamo.reset()
        for layer in model.decoder.layers:
            layer.compile(fullgraph=True, backend="aot_eager")
    first, second = model(tokens()).logits, model(tokens(MODALITY.flip(0))).logits
    (first.square().sum() + second.pow(3).sum()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("how", ["recomputed", pytest.param("compiled", marks=pytest.mark.slow)])
def test_two_forwards_before_one_backward(how: str) -> None:
    wanted, found = gradients(made(), "plain"), gradients(made(), how)
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 1e-9, f"{name} learns nothing"
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_a_copy_goes_its_own_way() -> None:
    model = made()
    other = copy.deepcopy(model)
    wanted = model(tokens()).logits
    assert torch.equal(other(tokens()).logits, wanted)
    assert other.decoder.ways is not model.decoder.ways
    assert all(module.ways is other.decoder.ways for module in other.decoder.modules() if hasattr(module, "ways"))


def test_a_token_meets_as_much_as_in_a_plain_model() -> None:
    ours, plain = (
        measure(validate(TransformerSpec, {**BASE, "stack": stack}).build()) for stack in (BASE["stack"], "plain")
    )
    assert (ours.active_parameters, ours.flops_per_token) == (plain.active_parameters, plain.flops_per_token)
    assert ours.parameters - V * 16 == E * (plain.parameters - V * 16)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"ffn": "multiway"}, "layer 0: stack multiway goes with ffn mlp, swiglu, geglu, reglu, not multiway"),
        (
            {"attention": {"kind": "softmax", "heads": 2, "qk_norm": True}},
            "layer 0: stack multiway has no norms of heads",
        ),
        ({"linear": {"kind": "lora", "rank": 2}}, "linear lora more than one matrix"),
        ({"stack": {"kind": "multiway", "modalities": 0}}, "modalities"),
    ],
)
def test_refusals(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TorchstoneError, match=sentence):
        validate(TransformerSpec, {**BASE, **fields})


def test_a_modality_that_there_is_none_of() -> None:
    with pytest.raises(TorchstoneError, match="stack multiway: no modality 3; there are 3, from 0"):
        made()(tokens(MODALITY + 1))
