"""Sub-LN: where its norms are in every kind of sublayer, its gain, and what cancels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.model.linear import Linear
from torchstone.model.norm.layernorm import LayerNorm
from torchstone.model.residual.subln import gain
from torchstone.model.site import initialise
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.spec import validate


def model(residual: Any = "subln", seed: int = 0, **fields: Any) -> Transformer:
    body = {"width": 64, "depth": 3, "vocabulary": 61, "context": 64, "attention": {"heads": 4}, "norm": "layernorm"}
    return initialise(validate(TransformerSpec, {**body, "residual": residual, **fields}).build(), seed)  # type: ignore[return-value]


def projections(module: nn.Module) -> list[tuple[str, Linear]]:
    return [(name, each) for name, each in module.named_modules() if isinstance(each, Linear)]


# ----------------------------------------------------------------------------------------------------------------- gain


@pytest.mark.parametrize("layers", [1, 2, 12, 24, 1000])
def test_gain_of_encoder_and_decoder_alone_is_the_root_of_log_sublayers(layers: int) -> None:
    assert gain((layers, 0), "encoder") == gain((0, layers), "decoder")
    assert gain((0, layers), "decoder") ** 2 == pytest.approx(math.log(2 * layers), abs=1e-9)


def test_gains_as_numbers() -> None:
    assert gain((0, 12), "decoder") == pytest.approx(1.7827, abs=5e-5)
    assert gain((0, 24), "decoder") == pytest.approx(1.9675, abs=5e-5)
    assert gain((18, 18), "decoder") == pytest.approx(1.9972, abs=5e-5)
    assert gain((18, 18), "encoder") == pytest.approx(2.1829, abs=5e-5)
    assert gain((6, 50), "encoder") == pytest.approx(math.sqrt(math.log(150) * math.log(12) / 3), abs=1e-9)
    assert gain((6, 50), "decoder") == pytest.approx(math.sqrt(math.log(150)), abs=1e-9)


ATTENTIONS: list[dict[str, Any]] = [
    {"kind": "softmax", "heads": 4, "kv_heads": 2, "bias": "all"},
    {"kind": "retention", "heads": 4},
    {"kind": "gated_retention", "heads": 4},
    {"kind": "dilated", "heads": 4, "segments": [4, 8], "dilations": [1, 2]},
    {"kind": "mla", "heads": 4, "kv_latent": 32, "nope_dim": 16, "rope_dim": 8, "v_dim": 16, "q_latent": 48},
]
FFNS: list[Any] = [{"kind": "mlp", "bias": True}, {"kind": "swiglu"}, {"kind": "geglu"}]
STACKS: list[dict[str, Any]] = [
    {"stack": {"kind": "lazy"}, "depth": 4},
    {"stack": {"kind": "yoco"}, "depth": 4},
    {"stack": {"kind": "tim", "plain_first": 1, "plain_last": 1}, "depth": 4},
    {
        "stack": {
            "kind": "hysparse",
            "sparse_per_full": 1,
            "final_full": False,
            "block": 2,
            "top_tokens": 4,
            "window": 3,
        },
        "depth": 4,
    },
]
FORMS: list[dict[str, Any]] = [
    *({"attention": attention} for attention in ATTENTIONS),
    *({"ffn": ffn} for ffn in FFNS),
    *STACKS,
    {"block": "parallel"},
    {"block": "attention_only"},
    {"causal": False},
    {"encoder": {"depth": 2}},
]


@pytest.mark.parametrize("fields", FORMS, ids=lambda fields: str(next(iter(fields.values())))[:40])
def test_what_goes_into_every_output_projection_is_normalised(fields: dict[str, Any]) -> None:
    """A norm of gain one: mean 0 and variance 1 over the inputs of the projection. Cross-attentions have none."""
    built, seen = model(**fields), {}
    for name, projection in projections(built):
        if projection.roles in (("out",), ("down",)):
            projection.register_forward_pre_hook(lambda m, x, name=name: seen.update({name: x[0]}))
    ids = torch.randint(61, (2, 16))
    built(ids, **({"memory": ids} if "encoder" in fields else {}))
    assert seen
    for name, x in seen.items():
        mean, var = x.mean(-1), x.var(-1, unbiased=False)
        alike = torch.allclose(mean, torch.zeros_like(mean), atol=1e-4) and torch.allclose(
            var, torch.ones_like(var), atol=0.2
        )
        assert alike == (".cross." not in name), name


@pytest.mark.parametrize("attention", ATTENTIONS, ids=lambda attention: attention["kind"])
@pytest.mark.parametrize("ffn", FFNS, ids=lambda ffn: ffn["kind"])
def test_gain_of_every_projection_goes_by_its_role(attention: dict[str, Any], ffn: Any) -> None:
    built = model({"kind": "subln", "gamma": 3.0}, width=256, depth=1, attention=attention, ffn=ffn)
    for name, module in projections(built.decoder):  # type: ignore[arg-type]
        for part, role in zip(module.weight.split(module.slices), module.roles, strict=True):
            std = (1.0 if role in ("q", "k") else 3.0) * math.sqrt(2 / sum(part.shape))
            assert abs(part.std().item() / std - 1) < 6 / math.sqrt(2 * part.numel()), f"{name}, {role}"


def test_sides_have_gains_of_their_own_and_cross_attentions_none() -> None:
    built = model(width=256, depth=4, encoder={"depth": 3}, ffn="mlp")
    decoder, encoder = built.decoder.layers[1], built.encoder.layers[2]  # type: ignore[union-attr]
    of_encoder, of_decoder = math.sqrt(math.log(12) * math.log(6) / 3), math.sqrt(math.log(12))
    for weight, gamma in (
        (encoder.attention.out.weight, of_encoder),
        (encoder.attention.qkv.weight[512:], of_encoder),
        (decoder.attention.out.weight, of_decoder),
        (decoder.attention.qkv.weight[:256], 1.0),
        (decoder.cross.out.weight, 1.0),
        (decoder.cross.q.weight, 1.0),
        (decoder.cross.kv.weight[256:], 1.0),
    ):
        assert weight.std().item() == pytest.approx(gamma / 16, rel=0.02)
    assert isinstance(decoder.cross.inner_norm, nn.Identity)
    assert isinstance(decoder.attention.inner_norm, LayerNorm) and isinstance(decoder.ffn.inner_norm, LayerNorm)
    assert all(isinstance(stack.norm, LayerNorm) for stack in built.stacks.values())


def test_what_stands_outside_layers_starts_as_with_other_residuals() -> None:
    fields: dict[str, Any] = {"head": {"kind": "mlm", "tied": False}, "causal": False, "embedding": {"size": 24}}
    ours, theirs = model(**fields).state_dict(), model("pre", **fields).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.startswith("encoder."))


# ----------------------------------------------------------------------------------------------------------- identities


@pytest.mark.usefixtures("float64")
def test_scale_of_values_and_of_hidden_units_cancels() -> None:
    tight = {"kind": "layernorm", "eps": 1e-12}
    for activation, which in (("relu", "vu"), ("gelu", "v")):
        built: Any = model(ffn={"kind": "mlp", "activation": activation}, norm=tight)
        ids = torch.randint(61, (2, 9))
        before = built(ids).logits
        with torch.no_grad():
            for layer in built.decoder.layers:
                layer.attention.qkv.weight[128:].mul_(7.0)
                if "u" in which:
                    layer.ffn.up.weight.mul_(0.3)
        torch.testing.assert_close(built(ids).logits, before, rtol=0, atol=1e-8)


@pytest.mark.usefixtures("float64")
def test_values_are_at_right_angles_to_their_gradient() -> None:
    built: Any = model(norm={"kind": "layernorm", "eps": 1e-12}, ffn={"kind": "mlp", "activation": "relu"})
    built(torch.randint(61, (2, 9))).logits.sin().sum().backward()
    for layer in built.decoder.layers:
        weight = layer.attention.qkv.weight
        q, v = ((weight.grad[part] * weight[part]).sum().abs() for part in (slice(0, 64), slice(128, 192)))
        scale = weight.grad[128:].norm() * weight[128:].norm()
        assert v < 1e-7 * scale
        assert q > 1e-7 * scale  # scores have no norm of that kind


@pytest.mark.usefixtures("float64")
def test_without_inner_norms_it_computes_what_pre_norm_does() -> None:
    ours, theirs = model(), model("pre")
    theirs.load_state_dict({name: x for name, x in ours.state_dict().items() if "inner_norm" not in name})
    ids = torch.randint(61, (2, 9))
    assert not torch.allclose(ours(ids).logits, theirs(ids).logits)
    for module in ours.modules():
        if hasattr(module, "inner_norm"):
            module.inner_norm = nn.Identity()
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.usefixtures("float64")
def test_layer_written_out() -> None:
    """x + W_o LN(attention(LN x)), x + W_2 LN(phi(W_1 LN x)), with torch's own functions."""
    built: Any = model(
        depth=1, position="none", ffn={"kind": "mlp", "hidden": 48, "activation": "relu"}, causal=False, head="mlm"
    )
    layer = built.encoder.layers[0]
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))

    def norm(x: torch.Tensor, m: Any) -> torch.Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], m.weight, m.bias)

    ids = torch.randint(61, (2, 7))
    x = built.embedding.weight[ids]
    q, k, v = (norm(x, layer.attention_residual.norm) @ layer.attention.qkv.weight.T).chunk(3, -1)
    heads = [
        (qh @ kh.transpose(1, 2) / 4).softmax(-1) @ vh
        for qh, kh, vh in zip(*(each.split(16, -1) for each in (q, k, v)), strict=True)
    ]
    x = x + norm(torch.cat(heads, -1), layer.attention.inner_norm) @ layer.attention.out.weight.T
    hidden = (norm(x, layer.ffn_residual.norm) @ layer.ffn.up.weight.T).relu()
    x = norm(x + norm(hidden, layer.ffn.inner_norm) @ layer.ffn.down.weight.T, built.encoder.norm)
    torch.testing.assert_close(built(ids, outputs="none").hidden, x, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("ffn", "hidden"), [({"kind": "mlp", "hidden": 100}, 100), ({"kind": "swiglu", "hidden": 72}, 72)]
)
def test_parameters_are_those_of_pre_norm_and_of_two_norms_a_layer(ffn: dict[str, Any], hidden: int) -> None:
    ours, theirs = (sum(x.numel() for x in model(kind, ffn=ffn).parameters()) for kind in ("subln", "pre"))
    assert ours - theirs == 3 * (2 * 64 + 2 * hidden)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"residual": {"kind": "subln", "alpha": 2.0}}, "alpha"),
        ({"residual": {"kind": "subln", "gamma": 0}}, "gamma"),
        ({"residual": ["subln", "deepnorm"]}, "residual"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(TorchstoneError, match=said):
        validate(TransformerSpec, {"width": 64, "depth": 3, "vocabulary": 61, "attention": {"heads": 4}, **fields})
