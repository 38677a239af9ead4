"""TorchScale's `BEiT3` (Wang et al. 2022, arXiv 2208.10442; Ma et al. 2022, arXiv 2211.13184): its multiway encoder
over pictures and texts; see `_torchscale`.

Without an output layer, as the released models are, ours is the matrix of the text embedding. The two tables of
positions are the embedding's; as elsewhere their first two rows stand for no position.
"""

from __future__ import annotations

from typing import Any

from torchstone.interop.layout import Config, Layout, Model, Rule, Shapes
from torchstone.interop.layouts._shared import CONVOLUTION, SINGLE
from torchstone.interop.layouts._torchscale import (
    FREE,
    KINDS,
    OPTIONS,
    SKIPPED,
    TABLE,
    attention,
    check_options,
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
    stack,
)

__all__ = ["LAYOUT"]

_SIZES = {"img_size": 224, "patch_size": 16, "in_chans": 3}
_OPTIONS = OPTIONS | sided("encoder") | {*_SIZES, "normalize_output", "share_encoder_input_output_embed"}
_TEXT = "encoder.embed_positions.B.weight"


def _spec(config: Config, kind: str, shapes: Shapes | None) -> dict[str, Any]:
    check_options(config, _OPTIONS)
    config.only("share_encoder_input_output_embed", False)
    body = shared(config, "encoder")
    body["residual"] = residual(config, "encoder", shapes)
    if body["residual"]["kind"] in ("subln", "pre"):
        config.only("normalize_output", True)
    places, told = position(config, "encoder", {})  # tables are the embedding's
    text = told if shapes is None or _TEXT not in shapes else shapes[_TEXT][0] - TABLE.rows
    image, patch, channels = (config.get(name, usual) for name, usual in _SIZES.items())
    return {
        **body,
        "position": places,
        "context": 1 + (image // patch) ** 2 + text,
        "norm": norm(config),
        "stack": stack(Config(config.model_type, {**config.values, "multiway": True})),
        "attention": attention(config, "encoder"),
        "ffn": ffn(config, "encoder"),
        **head(config, "share_encoder_input_output_embed", shapes, "text_embed.weight"),
        "embedding": {
            "kind": "vision_language",
            "image": image,
            "patch": patch,
            "channels": channels,
            "positions": text,
            "scale": body["embedding"]["scale"],
        },
    }


def _config(model: Model) -> dict[str, Any]:
    embedding: Any = model.spec.embedding
    layer: Any = model.encoder[0]
    own_head: Any = model.spec.head
    sizes = {"img_size": embedding.image, "patch_size": embedding.patch, "in_chans": embedding.channels}
    body = {**side_config(model, "encoder"), **shared_config(model, "encoder"), **sizes}
    return {
        **body,
        "multiway": True,
        "max_source_positions": embedding.positions + TABLE.rows,
        "attention_dropout": layer.attention.dropout,
        "no_output_layer": own_head.tied,
    }


LAYOUT = Layout(
    model_type="torchscale-beit3",
    sides=("encoder",),
    architectures={"BEiT3": "lm"},
    kinds=KINDS
    | {
        "stack": ("multiway",),
        "embedding": ("vision_language",),
        "attention": ("softmax",),
        "position": ("none", "t5"),
    },
    spec=_spec,
    config=_config,
    rules=(
        Rule("embedding.weight", "text_embed.weight"),
        Rule("embedding.project.weight", "vision_embed.proj.weight", CONVOLUTION),
        Rule("embedding.project.bias", "vision_embed.proj.bias"),
        Rule("embedding.class_token", "vision_embed.cls_token", SINGLE),
        Rule("embedding.mask_token", "vision_embed.mask_token", SINGLE),
        Rule("embedding.vision_positions", "encoder.embed_positions.A.weight", TABLE),
        Rule("embedding.text_positions", _TEXT, TABLE),
        *rules("encoder", "encoder."),
    ),
    heads={"lm": (Rule("head.out.weight", "encoder.output_projection.weight"),)},
    skipped=SKIPPED,
    free=FREE,
    hub=False,
)
