"""First values come from a generator keyed by seed and parameter name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from torchstone.keys import Key
from torchstone.model.site import Site, initialise, parameter_name
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.spec import resolve, validate


def spec(**fields: Any) -> TransformerSpec:
    body = {"width": 64, "depth": 4, "vocabulary": 101, "context": 64, "attention": {"heads": 4}, **fields}
    return validate(TransformerSpec, body)


def test_values_depend_on_seed_and_name_alone() -> None:
    a, b = initialise(spec().build(), 3), initialise(spec(depth=2).build(), 3)
    theirs = dict(b.named_parameters())
    for name, parameter in a.named_parameters():
        if name in theirs and not name.endswith(("out.weight", "down.weight")):  # those shrink with depth
            assert torch.equal(parameter, theirs[name]), name


def test_dtype_and_threads_change_nothing_but_rounding() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        wide = initialise(spec().build(), 3)
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(wide.parameters(), initialise(spec().build(), 3).parameters(), strict=True):
        assert torch.equal(a.float(), b)


def test_wrappers_change_no_name() -> None:
    assert parameter_name("_orig_mod.layers.0._checkpoint_wrapped_module.x.weight") == "layers.0.x.weight"
    plain, wrapped = spec().build(), spec().build()
    wrapped.decoder.layers[0] = torch.compile(wrapped.decoder.layers[0], backend="eager")
    initialise(plain, 0), initialise(wrapped, 0)
    ours = {parameter_name(name): value for name, value in wrapped.state_dict().items()}
    assert all(torch.equal(value, ours[name]) for name, value in plain.state_dict().items())


def test_weights_start_as_the_residual_says() -> None:
    built = initialise(spec(depth=8).build(), 0)
    layer = built.decoder.layers[3]
    for weight, std in (
        (layer.attention.qkv.weight, 0.02),
        (layer.ffn.gate_up.weight, 0.02),
        (layer.attention.out.weight, 0.02 / math.sqrt(16)),
        (layer.ffn.down.weight, 0.02 / math.sqrt(16)),
        (built.embedding.weight, 0.02),
    ):
        assert abs(weight.std().item() / std - 1) < 6 / math.sqrt(2 * weight.numel())
        assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel())
    assert layer.attention_residual.norm.weight.eq(1).all()


def test_outputs_start_smaller_the_deeper_their_layer() -> None:
    built = initialise(spec(width=128, depth=6, residual="post_scaled").build(), 0)
    for number, layer in enumerate(built.decoder.layers):
        for weight, std in (
            (layer.attention.qkv.weight, 0.02),
            (layer.ffn.gate_up.weight, 0.02),
            (layer.attention.out.weight, 0.02 / math.sqrt(2 * (number + 1))),
            (layer.ffn.down.weight, 0.02 / math.sqrt(2 * (number + 1))),
        ):
            assert weight.std().item() == pytest.approx(std, rel=0.03)
    assert built.embedding.weight.std().item() == pytest.approx(0.02, rel=0.03)


def test_slices_of_a_fused_projection_start_by_their_own_roles() -> None:
    seen = []

    def rule(weight: torch.Tensor, role: str, generator: torch.Generator) -> None:
        seen.append((role, tuple(weight.shape)))
        nn.init.normal_(weight, 0, {"q": 1.0, "k": 2.0, "v": 3.0}[role], generator=generator)

    module = Site(width=64).linear(64, (64, 32, 32), ("q", "k", "v"))
    module.init = rule
    initialise(module, 0)
    assert seen == [("q", (64, 64)), ("k", (32, 64)), ("v", (32, 64))]
    q, k, v = module.weight.split((64, 32, 32))
    assert q.std() < k.std() < v.std()


def test_prefix_is_the_rest_of_the_name() -> None:
    built = initialise(spec().build(), 0)
    alone = spec().build().decoder.layers[2]
    initialise(alone, 0, prefix="decoder.layers.2")
    for name, parameter in alone.named_parameters():
        assert torch.equal(parameter, built.get_parameter(f"decoder.layers.2.{name}"))


def test_module_that_does_not_say_how_its_parameters_start_is_a_bug() -> None:
    with pytest.raises(TypeError, match=r"Linear has the parameter a.weight and no initialise"):
        initialise(nn.ModuleDict({"a": nn.Linear(2, 2)}), 0)


def test_keys_of_strings_and_numbers_differ_and_fold_in_order() -> None:
    key = Key(5)
    assert key.fold(1) != key.fold("1") and key.fold("a", "b") != key.fold("ab") != key.fold("b", "a")
    assert key.fold("a").fold("b") != key.fold("a", "b")
    assert key.fold("x").tensor().dtype == torch.int64 and key.fold("x").tensor().item() == key.fold("x").value
    assert torch.equal(torch.rand(3, generator=key.generator()), torch.rand(3, generator=Key(5).generator()))
    assert (key.numpy().random(3) == Key(5).numpy().random(3)).all()


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_norms_start_as_pure_normalisation(norm: str) -> None:
    module = initialise(resolve("norm", norm)().build(16), 0)
    y = module(torch.randn(5, 16) * 7)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(5), rtol=1e-3, atol=1e-3)


def test_no_wrapper_and_no_buffer_is_in_a_fresh_model() -> None:
    built = spec().build()
    assert isinstance(built, Transformer)
    assert list(built.buffers()) == [] and set(built.state_dict()) == {name for name, _ in built.named_parameters()}
