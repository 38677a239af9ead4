"""TorchScale's `RetNetDecoder` (Sun et al. 2023, arXiv 2307.08621; Ma et al. 2022, arXiv 2211.13184); see
`_torchscale`.

The activation of its gated network is of `fc1`, which is our gate. `subln` means nothing: there are no norms inside
sublayers but that of each head. It has no attention dropout and no positions besides its rotations.
"""

from __future__ import annotations

from typing import Any

from torchstone.interop.layout import Config, Copy, Layout, Model, Rule, Shapes
from torchstone.interop.layouts._torchscale import (
    FREE,
    OPTIONS,
    check_options,
    head,
    norm,
    residual,
    shared,
    shared_config,
    side_config,
    sided,
    stem_rules,
)

__all__ = ["LAYOUT"]

_NOT = {"attention_dropout", "rel_pos_buckets", "max_rel_pos", "segment_length", "dilated_ratio"}
_OWN = {"decoder_value_embed_dim", "decoder_retention_heads", "chunkwise_recurrent", "recurrent_chunk_size"}
_TIED = "share_decoder_input_output_embed"
_OPTIONS = ((OPTIONS - _NOT) | sided("decoder") | _OWN | {_TIED}) - {"decoder_attention_heads"}
_EPS = 1e-6
_GATES: dict[str, dict[str, Any]] = {
    "gelu": {"kind": "geglu", "activation": "gelu"},
    "relu": {"kind": "reglu", "activation": "relu"},
    "swish": {"kind": "swiglu"},
}
"""Their name of the gate's activation -> our feed-forward network."""


def _spec(config: Config, kind: str, shapes: Shapes | None) -> dict[str, Any]:
    check_options(config, _OPTIONS)
    config.only("multiway", False)
    config.only("xpos_rel_pos", False)
    config.only("moe_freq", 0)  # its experts would have layer norms inside
    body = shared(config, "decoder")
    body["norm"] = norm(config, _EPS, "rmsnorm")
    if config.get("layernorm_embedding", False):
        body["embedding"]["norm"] = body["norm"]
    return {
        **body,
        "attention": {
            "kind": "retention",
            "heads": config.get("decoder_retention_heads", 3),
            "value_expansion": config.get("decoder_value_embed_dim", 1280) / body["width"],
            "eps": body["norm"]["eps"],
        },
        "position": {"kind": "rotary", "interleaved": True, "inclusive": True},
        "ffn": {**config.choose("activation_fn", _GATES, "gelu"), "hidden": config.get("decoder_ffn_embed_dim", 1280)},
        "residual": residual(config, "decoder", shapes, inner=False),
        **head(config, _TIED, shapes),
    }


def _config(model: Model) -> dict[str, Any]:
    layer: Any = model.decoder[0]
    own_head: Any = model.spec.head
    body = {**side_config(model, "decoder"), **shared_config(model, "decoder"), _TIED: own_head.tied}
    body["decoder_retention_heads"] = body["decoder_attention_heads"]
    body["decoder_value_embed_dim"] = layer.attention.values(model.spec.width)
    body["activation_fn"] = next(name for name, gate in _GATES.items() if gate["kind"] == layer.ffn.kind)
    return {key: value for key, value in body.items() if key in _OPTIONS}


_OURS, _THEIRS = "decoder.layers.{i}", "layers.{i}"

LAYOUT = Layout(
    model_type="torchscale-retnet",
    sides=("decoder",),
    architectures={"RetNetDecoder": "lm"},
    kinds={
        "attention": ("retention",),
        "position": ("rotary",),
        "ffn": ("geglu", "reglu", "swiglu"),
        "residual": ("pre", "deepnorm", "post", "weighted"),
        "norm": ("rmsnorm",),
    },
    spec=_spec,
    config=_config,
    rules=(
        *stem_rules(),
        Rule(
            f"{_OURS}.attention.qkvg.weight",
            tuple(f"{_THEIRS}.retention.{part}_proj.weight" for part in ("q", "k", "v", "g")),
        ),
        Rule(f"{_OURS}.attention.out.weight", f"{_THEIRS}.retention.out_proj.weight"),
        Rule(f"{_OURS}.attention_residual.norm.weight", f"{_THEIRS}.retention_layer_norm.weight"),
        Rule(f"{_OURS}.ffn.gate_up.weight", (f"{_THEIRS}.ffn.fc1.weight", f"{_THEIRS}.ffn.gate.weight")),
        Rule(f"{_OURS}.ffn.down.weight", f"{_THEIRS}.ffn.fc2.weight"),
        Rule(f"{_OURS}.ffn_residual.norm.weight", f"{_THEIRS}.final_layer_norm.weight"),
        Rule("decoder.norm.weight", "layer_norm.weight"),
    ),
    heads={"lm": (Rule("head.out.weight", "output_projection.weight"),)},
    copies=(Copy("output_projection.weight", of="embed_tokens.weight", written=True),),
    skipped=("retnet_rel_pos.*",),
    renamed=(("decoder.", ""),),
    free=FREE,
    hub=False,
)
