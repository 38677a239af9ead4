"""TorchScale's `EncoderDecoder` (Ma et al. 2022, arXiv 2211.13184) with one embedding for both sides
(`share_all_embeddings`); see `_torchscale`.

What has no place: relative positions, which TorchScale adds to cross-attentions too, xPos, which it also gives the
encoder, and a norm of the embedding, of which each side has its own.
"""

from __future__ import annotations

from typing import Any

from torchstone.errors import TorchstoneError
from torchstone.interop.layout import Config, Copy, Layout, Model, Rule, Shapes
from torchstone.interop.layouts._torchscale import (
    FREE,
    KINDS,
    OPTIONS,
    SKIPPED,
    attention,
    check_options,
    experts,
    ffn,
    head,
    norm,
    position,
    residual,
    rules,
    shared,
    shared_config,
    side_config,
    sided,
)

__all__ = ["LAYOUT"]

_SHARED = ("share_all_embeddings", "share_decoder_input_output_embed")
_OPTIONS = OPTIONS | sided("encoder") | sided("decoder") | {*_SHARED, "normalize_output"}


def _spec(config: Config, kind: str, shapes: Shapes | None) -> dict[str, Any]:
    check_options(config, _OPTIONS)
    config.only("multiway", False)
    if not config.get("share_all_embeddings", False):
        raise TorchstoneError(
            f"{config.model_type} config: share_all_embeddings False is not supported; supported: True"
        )
    config.only("layernorm_embedding", False)
    for key, value in (("rel_pos_buckets", 0), ("max_rel_pos", 0), ("xpos_rel_pos", False)):
        config.only(key, value)
    body = shared(config, "decoder")
    if config.get("encoder_embed_dim", 768) != body["width"]:
        raise TorchstoneError(
            f"{config.model_type} config: encoder_embed_dim {config.get('encoder_embed_dim', 768)} is not supported; "
            f"supported: that of decoder_embed_dim, {body['width']}"
        )
    own = residual(config, "decoder", shapes)
    theirs = residual(config, "encoder", shapes)
    if theirs["kind"] in ("subln", "pre"):
        config.only("normalize_output", True)
    place, context = position(config, "decoder", shapes, "decoder.embed_positions.weight")
    other, reach = position(config, "encoder", shapes, "encoder.embed_positions.weight")
    if "learned" in (place["kind"], other["kind"]) and (place, context) != (other, reach):
        raise TorchstoneError(
            f"{config.model_type} config: max_source_positions {reach + 2} beside max_target_positions {context + 2} "
            "is not supported; supported: tables of one length on both sides"
        )
    encoder = {
        "depth": config.get("encoder_layers", 12),
        "layers": experts(config, "encoder"),
        "attention": attention(config, "encoder"),
        "ffn": ffn(config, "encoder"),
        "residual": theirs,
    }
    return {
        **body,
        **head(config, _SHARED[0], shapes, "encoder.embed_tokens.weight"),
        "context": context,
        "attention": attention(config, "decoder"),
        "position": place,
        "ffn": ffn(config, "decoder"),
        "residual": own,
        "norm": norm(config),
        "encoder": encoder,
    }


def _config(model: Model) -> dict[str, Any]:
    layer: Any = model.decoder[0]
    body = {**side_config(model, "encoder"), **side_config(model, "decoder"), **shared_config(model, "decoder")}
    return {**body, "attention_dropout": layer.attention.dropout, **dict.fromkeys(_SHARED, True)}


_OURS, _THEIRS = "decoder.layers.{i}", "decoder.layers.{i}"

LAYOUT = Layout(
    model_type="torchscale-encoder-decoder",
    sides=("encoder", "decoder"),
    architectures={"EncoderDecoder": "lm"},
    kinds={**KINDS, "attention": ("softmax",), "position": ("none", "learned")},
    spec=_spec,
    config=_config,
    rules=(
        Rule("embedding.weight", "encoder.embed_tokens.weight"),
        *rules("encoder", "encoder."),
        *rules("decoder", "decoder."),
        Rule(f"{_OURS}.cross.q.{{p}}", f"{_THEIRS}.encoder_attn.q_proj.{{p}}"),
        Rule(
            f"{_OURS}.cross.kv.{{p}}",
            (f"{_THEIRS}.encoder_attn.k_proj.{{p}}", f"{_THEIRS}.encoder_attn.v_proj.{{p}}"),
        ),
        Rule(f"{_OURS}.cross.out.{{p}}", f"{_THEIRS}.encoder_attn.out_proj.{{p}}"),
        Rule(f"{_OURS}.cross_residual.norm.{{p}}", f"{_THEIRS}.encoder_attn_layer_norm.{{p}}"),
    ),
    heads={},
    copies=(
        Copy("decoder.embed_tokens.weight", of="encoder.embed_tokens.weight", written=True),
        Copy("decoder.output_projection.weight", of="encoder.embed_tokens.weight", written=True),
    ),
    skipped=SKIPPED,
    free=FREE,
    hub=False,
)
