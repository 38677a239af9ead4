"""BEiT: a vision Transformer pre-trained on visual tokens of hidden patches (Bao et al. 2021, arXiv 2106.08254),
under the head that predicts them, or under a mean over patches and a classifier.

A table of relative positions serves all layers while it is pre-trained, and each has its own when it is fine-tuned. The
mean and deviation of pixels are those of preprocessor_config.json, which lies beside the config. The rate of dropped
paths grows with the layer there as it does here.
"""

from __future__ import annotations

from typing import Any

from torchstone.errors import TorchstoneError
from torchstone.interop.layout import Config, Layout, Model, Rule, Shapes
from torchstone.interop.layouts._shared import (
    ACTIVATIONS,
    CONVOLUTION,
    SINGLE,
    activation_name,
    class_names,
    classes,
)

__all__ = ["LAYOUT"]

_LAYER = "beit.encoder.layer.{i}"
_TABLE = "relative_position_bias.relative_position_bias_table"
_OWN = f"{_LAYER}.attention.attention.{_TABLE}"


def _spec(config: Config, head: str, shapes: Shapes | None) -> dict[str, Any]:
    config.only("use_absolute_position_embeddings", False)
    shared, own = (config.get(f"use_{which}relative_position_bias", False) for which in ("shared_", ""))
    if shared and own:
        raise TorchstoneError("beit config: relative positions that are shared and of each layer are not supported")
    scale = config.get("layer_scale_init_value", 0.1)
    if scale <= 0:
        raise TorchstoneError(f"beit config: layer_scale_init_value {scale!r} is not supported; it must be above 0")
    classifies = head == "classification"
    if classifies:
        config.only("use_mean_pooling", True)
    norm = {"kind": "layernorm", "eps": config.get("layer_norm_eps", 1e-12)}
    heads: dict[str, dict[str, Any]] = {
        "lm": {"tied": False, "bias": True},
        "classification": {"classes": classes(config), "pool": "patches", "norm": True},
    }
    return {
        "causal": False,
        "vocabulary": None if classifies else config.get("vocab_size", 8192),
        "width": config.get("hidden_size", 768),
        "depth": config.get("num_hidden_layers", 12),
        "embedding": {
            "kind": "patch",
            "image": config.get("image_size", 224),
            "patch": config.get("patch_size", 16),
            "channels": config.get("num_channels", 3),
            "mask_token": config.get("use_mask_token", False),
            "mean": config.get("image_mean", [0.5]),
            "std": config.get("image_std", [0.5]),
        },
        "attention": {
            "kind": "softmax",
            "heads": config.get("num_attention_heads", 12),
            "bias": "qvo",
            "dropout": config.get("attention_probs_dropout_prob", 0.0),
        },
        "position": {"kind": "relative_2d", "shared": bool(shared)} if shared or own else {"kind": "none"},
        "ffn": {
            "kind": "mlp",
            "hidden": config.get("intermediate_size", 3072),
            "activation": config.choose("hidden_act", ACTIVATIONS, "gelu"),
            "bias": True,
        },
        "residual": {
            "kind": "layer_scale",
            "scale": scale,
            "final": not classifies,
            "std": config.get("initializer_range", 0.02),
        },
        "norm": norm,
        "dropout": config.get("hidden_dropout_prob", 0.0),
        "drop_path": config.get("drop_path_rate", 0.1),
        "head": {"kind": head, **heads[head]},
    }


def _config(model: Model) -> dict[str, Any]:
    layer: Any = model.encoder[0]
    head: Any = model.spec.head
    embedding: Any = model.spec.embedding
    position: Any = layer.position
    relative = position.kind == "relative_2d"
    return {
        **({} if model.spec.vocabulary is None else {"vocab_size": model.spec.vocabulary}),
        "hidden_size": model.spec.width,
        "num_hidden_layers": len(model.encoder),
        "num_attention_heads": layer.attention.heads,
        "intermediate_size": layer.ffn.hidden,
        "hidden_act": activation_name(layer.ffn.activation),
        "hidden_dropout_prob": model.spec.dropout,
        "attention_probs_dropout_prob": layer.attention.dropout,
        "drop_path_rate": model.spec.drop_path,
        "initializer_range": layer.residual.std,
        "layer_norm_eps": layer.norm.eps,
        "layer_scale_init_value": layer.residual.scale,
        "image_size": embedding.image,
        "patch_size": embedding.patch,
        "num_channels": embedding.channels,
        "image_mean": list(embedding.mean),
        "image_std": list(embedding.std),
        "use_mask_token": embedding.mask_token,
        "use_absolute_position_embeddings": False,
        "use_relative_position_bias": relative and not position.shared,
        "use_shared_relative_position_bias": relative and position.shared,
        "use_mean_pooling": True,
        **(class_names(head.classes) if head.kind == "classification" else {}),
    }


LAYOUT = Layout(
    model_type="beit",
    sides=("encoder",),
    architectures={"BeitForMaskedImageModeling": "lm", "BeitForImageClassification": "classification"},
    kinds={
        "embedding": ("patch",),
        "position": ("relative_2d", "none"),
        "ffn": ("mlp",),
        "residual": ("layer_scale",),
        "norm": ("layernorm",),
    },
    spec=_spec,
    config=_config,
    rules=(
        Rule("embedding.project.weight", "beit.embeddings.patch_embeddings.projection.weight", CONVOLUTION),
        Rule("embedding.project.bias", "beit.embeddings.patch_embeddings.projection.bias"),
        Rule("embedding.class_token", "beit.embeddings.cls_token", SINGLE),
        Rule("embedding.mask_token", "beit.embeddings.mask_token", SINGLE),
        Rule(
            "encoder.positions.relative_2d.weight",
            f"beit.encoder.{_TABLE}",
            where=lambda spec: getattr(spec.position, "shared", False),
        ),
        Rule("encoder.positions.relative_2d.weight", _OWN.format(i=0)),
        Rule("encoder.positions.relative_2d_{i}.weight", _OWN),
        Rule(
            "encoder.layers.{i}.attention.qkv.weight",
            tuple(f"{_LAYER}.attention.attention.{part}.weight" for part in ("query", "key", "value")),
        ),
        Rule(
            "encoder.layers.{i}.attention.qkv.bias",
            tuple(f"{_LAYER}.attention.attention.{part}.bias" for part in ("query", "value")),
        ),
        Rule("encoder.layers.{i}.attention.out.{p}", f"{_LAYER}.attention.output.dense.{{p}}"),
        Rule("encoder.layers.{i}.attention_residual.gamma", f"{_LAYER}.lambda_1"),
        Rule("encoder.layers.{i}.attention_residual.norm.{p}", f"{_LAYER}.layernorm_before.{{p}}"),
        Rule("encoder.layers.{i}.ffn.up.{p}", f"{_LAYER}.intermediate.dense.{{p}}"),
        Rule("encoder.layers.{i}.ffn.down.{p}", f"{_LAYER}.output.dense.{{p}}"),
        Rule("encoder.layers.{i}.ffn_residual.gamma", f"{_LAYER}.lambda_2"),
        Rule("encoder.layers.{i}.ffn_residual.norm.{p}", f"{_LAYER}.layernorm_after.{{p}}"),
    ),
    heads={
        "lm": (Rule("encoder.norm.{p}", "layernorm.{p}"), Rule("head.out.{p}", "lm_head.{p}")),
        "classification": (
            Rule("head.norm.{p}", "beit.pooler.layernorm.{p}"),
            Rule("head.out.{p}", "classifier.{p}"),
        ),
    },
    skipped=("*.relative_position_index",),
    prefix="beit.",
)
