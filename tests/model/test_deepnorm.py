"""DeepNorm: constants, first values, and what they are for, as its paper has them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.model.linear import Linear
from torchstone.model.residual.deepnorm import DeepNormResidual, DeepNormSpec, constants
from torchstone.model.site import Site, initialise
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.spec import validate

LAYERS = (1, 2, 6, 12, 24, 100, 1000)


def model(residual: Any = "deepnorm", seed: int = 0, **fields: Any) -> Transformer:
    body = {"width": 64, "depth": 3, "vocabulary": 61, "context": 64, "attention": {"heads": 4}, "norm": "layernorm"}
    return initialise(validate(TransformerSpec, {**body, "residual": residual, **fields}).build(), seed)  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------------------ constants


@pytest.mark.parametrize("layers", LAYERS)
def test_bound_of_the_update_is_one_whatever_the_depth(layers: int) -> None:
    for depths, side, sublayers in (
        ((layers, 0), "encoder", 2),
        ((0, layers), "decoder", 2),
        ((7, layers), "decoder", 3),  # a cross-attention too
    ):
        alpha, beta = constants(depths, side)  # type: ignore[arg-type]
        assert sublayers * layers * 2 * beta**2 / alpha**2 == pytest.approx(1.0, abs=1e-12)


def test_constants_of_an_encoder_with_a_decoder() -> None:
    for N, M in ((6, 6), (18, 18), (100, 100), (2, 50)):
        alpha, beta = constants((N, M), "encoder")
        assert alpha == pytest.approx(0.81 * (N**4 * M) ** 0.0625, abs=1e-12)
        assert beta == pytest.approx(0.87 * (N**4 * M) ** -0.0625, abs=1e-12)
        assert constants((N, M), "decoder") == pytest.approx(((3 * M) ** 0.25, (12 * M) ** -0.25), abs=1e-12)


@pytest.mark.parametrize(
    ("M", "alpha", "beta"), [(12, 2.2134, 0.31947), (100, 3.7606, 0.18803), (1000, 6.6874, 0.10574)]
)
def test_constants_of_decoders_as_numbers(M: int, alpha: float, beta: float) -> None:
    assert constants((0, M), "decoder") == pytest.approx((alpha, beta), abs=5e-5)


def test_encoder_alone_and_decoder_alone_have_the_same() -> None:
    assert constants((9, 0), "encoder") == constants((0, 9), "decoder")


# ---------------------------------------------------------------------------------------------------------- what builds


def joins(stack: nn.Module) -> list[DeepNormResidual]:
    return [module for module in stack.modules() if isinstance(module, DeepNormResidual)]


@pytest.mark.parametrize("fields", [{}, {"causal": False}, {"depth": 4, "encoder": {"depth": 2}}])
def test_every_join_has_the_skip_of_its_side(fields: dict[str, Any]) -> None:
    built = model(**fields)
    for side, stack in built.stacks.items():
        found = joins(stack)
        crosses = side == "decoder" and built.encoder is not None
        assert len(found) == (3 if crosses else 2) * len(stack.layers)
        assert {join.alpha for join in found} == {constants(built.spec.depths, side)[0]}  # type: ignore[arg-type]
        assert isinstance(stack.norm, nn.Identity)


@pytest.mark.parametrize(
    "attention",
    [
        {"kind": "softmax", "heads": 4, "kv_heads": 2, "bias": "all"},
        {"kind": "retention", "heads": 4},
        {"kind": "gated_retention", "heads": 4},
        {"kind": "dilated", "heads": 4, "segments": [4, 8], "dilations": [1, 2]},
        {"kind": "mla", "heads": 4, "kv_latent": 32, "nope_dim": 16, "rope_dim": 8, "v_dim": 16, "q_latent": 48},
    ],
    ids=lambda attention: attention["kind"],
)
@pytest.mark.parametrize("ffn", [{"kind": "mlp", "bias": True}, "swiglu", "geglu"], ids=str)
def test_gain_of_every_projection_goes_by_its_role(attention: dict[str, Any], ffn: Any) -> None:
    """Values, outputs and feed-forwards start smaller by beta, queries and keys do not; fans are those of a slice."""
    built = model({"kind": "deepnorm", "beta": 0.1}, width=256, depth=1, attention=attention, ffn=ffn)
    seen = set()
    for name, module in built.decoder.named_modules():  # type: ignore[union-attr]
        if isinstance(module, Linear):
            for part, role in zip(module.weight.split(module.slices), module.roles, strict=True):
                gain = 1.0 if role in ("q", "k") else 0.1
                std = gain * math.sqrt(2 / sum(part.shape))
                assert abs(part.std().item() / std - 1) < 6 / math.sqrt(2 * part.numel()), f"{name}, {role}"
                seen.add(role)
            assert module.bias is None or not module.bias.any()
    assert {"q", "k", "v", "out", "up", "down"} <= seen


def test_first_values_of_a_wide_value_matrix_are_within_two_per_cent_and_scores_ignore_depth() -> None:
    found = {}
    for depth in (1, 16):
        layer = model(width=512, depth=depth).decoder.layers[0]  # type: ignore[union-attr]
        q, k, v = (part.std().item() for part in layer.attention.qkv.weight.chunk(3))
        beta = constants((0, depth), "decoder")[1]
        assert v == pytest.approx(beta * 512**-0.5, rel=0.02)
        assert layer.attention.out.weight.std().item() == pytest.approx(beta * 512**-0.5, rel=0.02)
        found[depth] = (q, k)
        assert (q, k) == pytest.approx((512**-0.5, 512**-0.5), rel=0.02)
    assert found[1] == found[16]


def test_cross_attention_starts_as_the_rest_of_its_side() -> None:
    built = model(width=256, depth=2, encoder={"depth": 3})
    of_encoder, of_decoder = constants((3, 2), "encoder")[1], constants((3, 2), "decoder")[1]
    cross = built.decoder.layers[1].cross  # type: ignore[union-attr]
    k, v = cross.kv.weight.chunk(2)
    for weight, beta in (
        (cross.q.weight, 1.0),
        (k, 1.0),
        (v, of_decoder),
        (cross.out.weight, of_decoder),
        (built.encoder.layers[2].attention.out.weight, of_encoder),  # type: ignore[union-attr]
    ):
        assert weight.std().item() == pytest.approx(beta / 16, rel=0.02)


def test_what_stands_outside_layers_starts_as_with_other_residuals() -> None:
    fields: dict[str, Any] = {"head": {"kind": "mlm", "tied": False}, "causal": False, "embedding": {"size": 24}}
    ours, theirs = model(**fields).state_dict(), model("post", **fields).state_dict()
    outside = [name for name in ours if not name.startswith("encoder.")]
    assert any("transform" in name for name in outside) and any("project" in name for name in outside)
    assert all(torch.equal(ours[name], theirs[name]) for name in outside)


# ----------------------------------------------------------------------------------------------------------- identities


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("alpha", [1.0, 2.7])
def test_layer_is_that_of_torch_with_the_skip_weighted(alpha: float) -> None:
    """With alpha 1 it is `nn.TransformerEncoderLayer`; another alpha is the same layer's two norms written out."""
    D, H, T = 32, 4, 7
    built = model(
        {"kind": "deepnorm", "alpha": alpha, "beta": 1.0}, width=D, depth=1, causal=False, position="none",
        attention={"heads": H, "bias": "all"}, ffn={"kind": "mlp", "hidden": 48, "activation": "relu", "bias": True},
        head={"kind": "mlm"},
    )  # fmt: skip
    theirs = nn.TransformerEncoderLayer(D, H, 48, 0.0, "relu", batch_first=True, norm_first=False)
    ours: Any = built.encoder.layers[0]  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for mine, name in (
            (ours.attention.qkv, "self_attn.in_proj_"),
            (ours.attention.out, "self_attn.out_proj."),
            (ours.ffn.up, "linear1."),
            (ours.ffn.down, "linear2."),
            (ours.attention_residual.norm, "norm1."),
            (ours.ffn_residual.norm, "norm2."),
        ):
            theirs.get_parameter(name + "weight").copy_(mine.weight)
            theirs.get_parameter(name + "bias").copy_(mine.bias)
    ids = torch.randint(61, (2, T))
    x = built.embedding.weight[ids]
    y = theirs.norm1(alpha * x + theirs.self_attn(x, x, x, need_weights=False)[0])
    y = theirs.norm2(alpha * y + theirs.linear2(theirs.linear1(y).relu()))
    hidden = built(ids, outputs="none").hidden
    torch.testing.assert_close(hidden, y, rtol=0, atol=1e-10)
    if alpha == 1.0:
        torch.testing.assert_close(hidden, theirs(x), rtol=0, atol=1e-10)
    ours_grad, theirs_grad = (torch.autograd.grad(z.sin().sum(), built.embedding.weight)[0] for z in (hidden, y))
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("float64")
def test_with_both_constants_one_it_computes_what_post_norm_does() -> None:
    ours, theirs = model({"kind": "deepnorm", "alpha": 1.0, "beta": 1.0}), model("post")
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(61, (2, 9))
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert not torch.equal(model()(ids).logits, theirs(ids).logits)


def test_stream_after_every_sublayer_is_normalised_at_any_depth() -> None:
    built, seen = model(depth=60, width=32), []
    for join in joins(built.decoder):  # type: ignore[arg-type]
        join.norm.register_forward_hook(lambda module, inputs, out: seen.append(out))
    built(torch.randint(61, (1, 8)))
    assert len(seen) == 120
    for x in seen:
        torch.testing.assert_close(x.mean(-1), torch.zeros(1, 8), rtol=0, atol=1e-5)
        torch.testing.assert_close(x.var(-1, unbiased=False), torch.ones(1, 8), rtol=1e-2, atol=0)


def update(residual: str, depth: int, seed: int) -> float:
    """|change of the last hidden state| / sqrt(width) under one step of SGD at rate 0.05."""
    outputs = {"scale_outputs": False} if residual == "pre" else {}
    built = model({"kind": residual, "std": 64**-0.5, **outputs}, seed, depth=depth, ffn={"kind": "mlp", "hidden": 128})
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(61, (4, 16), generator=generator) for _ in range(2))
    before = built(ids)
    F.cross_entropy(before.logits.flatten(0, 1), labels.flatten()).backward()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
        change = built(ids, outputs="none").hidden - before.hidden
    return float(change.norm(dim=-1).mean() / 64**0.5)


@pytest.mark.parametrize("depth", [8, 32, pytest.param(128, marks=pytest.mark.slow)])
def test_first_step_changes_the_output_far_less_than_under_post_norm(depth: int) -> None:
    ours, theirs = (sum(update(kind, depth, seed) for seed in range(3)) / 3 for kind in ("deepnorm", "post"))
    assert ours < 0.35 * theirs


# ---------------------------------------------------------------------------------------------------------- as a recipe


def test_constants_are_of_the_depths_in_the_spec_so_that_a_saved_spec_keeps_them() -> None:
    spec = validate(TransformerSpec, model(depth=5).spec.dump())
    assert joins(spec.build())[0].alpha == 10**0.25
    with pytest.raises(RuntimeError, match="Missing key"):
        model(depth=6).load_state_dict(model(depth=5).state_dict())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"residual": {"kind": "deepnorm", "sub_norm": True}}, "sub_norm"),
        ({"residual": {"kind": "deepnorm", "alpha": 0}}, "alpha"),
        ({"residual": {"kind": "deepnorm", "beta": -1}}, "beta"),
        ({"depth": 0}, "depth"),
        ({"stack": "longmem", "depth": 4, "residual": "deepnorm"}, "residual deepnorm does not leave the stream a sum"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(TorchstoneError, match=said):
        validate(TransformerSpec, {"width": 64, "depth": 3, "vocabulary": 61, "attention": {"heads": 4}, **fields})


def test_one_join_alone() -> None:
    join = initialise(DeepNormSpec().build(Site(width=8, depths=(0, 12))), 0)
    assert join.alpha == pytest.approx(2.2134, abs=1e-4) and "alpha=2.2134" in repr(join)
