"""T5: pre-norm encoder-decoder with relative bias, unscaled attention and no biases (Raffel et al. 2019, 1910.10683).

Version 1.0 has relu and one matrix for embedding and head, before which hidden states are scaled by 1 / sqrt(width);
version 1.1 has gated tanh-gelu and a head of its own, not scaled. A published config says only whether the matrix is
tied. Configs of transformers 5 always say that it is, and say in `scale_decoder_outputs` whether states are scaled;
whether the head is tied is then seen from the tensors. `body`, `body_config`, `RULES`, `HEADS`, `COPIES`, `SKIPPED` and
`KINDS` serve mT5 too.
"""

from __future__ import annotations

from typing import Any

from torchstone.errors import TorchstoneError
from torchstone.interop.layout import Config, Copy, Layout, Model, Rule, Shapes
from torchstone.interop.layouts._shared import ACTIVATIONS, GATES, activation_name

__all__ = ["COPIES", "HEADS", "KINDS", "LAYOUT", "RULES", "SKIPPED", "body", "body_config"]


def _sublayers(side: str, ffn: int) -> tuple[Rule, ...]:
    block = f"{side}.block.{{i}}.layer"
    return (
        Rule(f"{side}.positions.t5.weight", f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        Rule(f"{side}.layers.{{i}}.attention_residual.norm.weight", f"{block}.0.layer_norm.weight"),
        Rule(
            f"{side}.layers.{{i}}.attention.qkv.weight",
            tuple(f"{block}.0.SelfAttention.{name}.weight" for name in "qkv"),
        ),
        Rule(f"{side}.layers.{{i}}.attention.out.weight", f"{block}.0.SelfAttention.o.weight"),
        Rule(f"{side}.layers.{{i}}.ffn_residual.norm.weight", f"{block}.{ffn}.layer_norm.weight"),
        Rule(f"{side}.layers.{{i}}.ffn.up.weight", f"{block}.{ffn}.DenseReluDense.wi.weight"),
        Rule(
            f"{side}.layers.{{i}}.ffn.gate_up.weight",
            tuple(f"{block}.{ffn}.DenseReluDense.{name}.weight" for name in ("wi_0", "wi_1")),
        ),
        Rule(f"{side}.layers.{{i}}.ffn.down.weight", f"{block}.{ffn}.DenseReluDense.wo.weight"),
        Rule(f"{side}.norm.weight", f"{side}.final_layer_norm.weight"),
    )


RULES = (
    Rule("embedding.weight", "shared.weight"),
    *_sublayers("encoder", ffn=1),
    *_sublayers("decoder", ffn=2),
    Rule("decoder.layers.{i}.cross_residual.norm.weight", "decoder.block.{i}.layer.1.layer_norm.weight"),
    Rule("decoder.layers.{i}.cross.q.weight", "decoder.block.{i}.layer.1.EncDecAttention.q.weight"),
    Rule(
        "decoder.layers.{i}.cross.kv.weight",
        (
            "decoder.block.{i}.layer.1.EncDecAttention.k.weight",
            "decoder.block.{i}.layer.1.EncDecAttention.v.weight",
        ),
    ),
    Rule("decoder.layers.{i}.cross.out.weight", "decoder.block.{i}.layer.1.EncDecAttention.o.weight"),
)

HEADS = {"lm": (Rule("head.out.weight", "lm_head.weight"),)}
COPIES = (
    Copy("encoder.embed_tokens.weight", of="shared.weight"),
    Copy("decoder.embed_tokens.weight", of="shared.weight"),
    Copy("lm_head.weight", of="shared.weight"),
)
# an embedding that early checkpoints hold and no version ever used
SKIPPED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)
KINDS = {"position": ("t5",), "ffn": ("mlp", "swiglu", "geglu", "reglu"), "residual": ("pre",), "norm": ("rmsnorm",)}

_FFN: dict[str, dict[str, Any]] = {
    **{name: {"kind": "mlp", "activation": ours} for name, ours in ACTIVATIONS.items()},
    **{f"gated-{name}": gate for name, gate in GATES.items()},
    "gated-gelu": GATES["gelu_new"],  # by this name readers have always meant the tanh approximation
}


def body(config: Config, ffn: str, head: dict[str, Any]) -> dict[str, Any]:
    """The spec of an encoder-decoder of this family under a head; `ffn` is used where the config names none."""
    config.only("is_encoder_decoder", True)
    dropout = config.get("dropout_rate", 0.1)
    encoder = config.need("num_layers")
    return {
        "vocabulary": config.need("vocab_size"),
        "width": config.need("d_model"),
        "depth": config.get("num_decoder_layers", encoder),
        "encoder": {"depth": encoder},
        "attention": {
            "kind": "softmax",
            "heads": config.need("num_heads"),
            "head_dim": config.need("d_kv"),
            "scale": 1.0,
            "dropout": dropout,
        },
        "position": {
            "kind": "t5",
            "buckets": config.get("relative_attention_num_buckets", 32),
            "far": config.get("relative_attention_max_distance", 128),
        },
        "ffn": {**config.choose("feed_forward_proj", _FFN, ffn), "hidden": config.need("d_ff")},
        "residual": {"kind": "pre"},
        "norm": {"kind": "rmsnorm", "eps": config.get("layer_norm_epsilon", 1e-6)},
        "dropout": dropout,
        "head": head,
    }


def body_config(model: Model) -> dict[str, Any]:
    """The config of an encoder-decoder of this family."""
    layer: Any = model.decoder[0]
    head: Any = model.spec.head
    ffn = layer.ffn
    gated = {"swiglu": "gated-silu", "geglu": "gated-gelu", "reglu": f"gated-{getattr(ffn, 'activation', None)}"}
    return {
        "vocab_size": model.spec.vocabulary,
        "d_model": model.spec.width,
        "d_kv": layer.attention.head_dim,
        "d_ff": ffn.hidden,
        "num_layers": len(model.encoder),
        "num_decoder_layers": len(model.decoder),
        "num_heads": layer.attention.heads,
        "relative_attention_num_buckets": layer.position.buckets,
        "relative_attention_max_distance": layer.position.far,
        "dropout_rate": model.spec.dropout,
        "layer_norm_epsilon": layer.norm.eps,
        "feed_forward_proj": gated.get(ffn.kind) or activation_name(ffn.activation),
        "is_encoder_decoder": True,
        "tie_word_embeddings": head.tied,
    }


def _spec(config: Config, head: str, shapes: Shapes | None) -> dict[str, Any]:
    says_tied = config.get("tie_word_embeddings", True)
    scale = config.get("scale_decoder_outputs", says_tied)
    own_matrix = not scale and shapes is not None and "lm_head.weight" in shapes
    return body(config, "relu", {"kind": "lm", "tied": says_tied and not own_matrix, "scale": scale})


def _config(model: Model) -> dict[str, Any]:
    head: Any = model.spec.head
    if head.scale and not head.tied:
        raise TorchstoneError(
            "the t5 layout has no place for head.scale where head.tied is false; it takes a tied head"
        )
    return {**body_config(model), "scale_decoder_outputs": head.scale}


LAYOUT = Layout(
    model_type="t5",
    sides=("encoder", "decoder"),
    architectures={"T5ForConditionalGeneration": "lm", "T5WithLMHeadModel": "lm"},
    kinds=KINDS,
    spec=_spec,
    config=_config,
    rules=RULES,
    heads=HEADS,
    copies=COPIES,
    skipped=SKIPPED,
    free=frozenset({"context"}),
)
