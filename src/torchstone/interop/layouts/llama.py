"""Llama: pre-norm decoder with grouped heads, rotary positions and a gated feed-forward (Touvron et al. 2023, arXiv
2307.09288; Dubey et al. 2024, arXiv 2407.21783).

`body`, `body_config`, `trunk_config`, `RULES` and `HEADS` serve the layouts that grew from it.
"""

from __future__ import annotations

from typing import Any

from torchstone.errors import TorchstoneError
from torchstone.interop.layout import Config, Copy, Layout, Model, Rule, Shapes
from torchstone.interop.layouts._shared import GATES, gate_name, rotary, rotary_config

__all__ = ["COPIES", "HEADS", "KINDS", "LAYOUT", "RULES", "SKIPPED", "body", "body_config", "trunk_config"]

RULES = (
    Rule("embedding.weight", "model.embed_tokens.weight"),
    Rule("decoder.layers.{i}.attention_residual.norm.weight", "model.layers.{i}.input_layernorm.weight"),
    Rule(
        "decoder.layers.{i}.attention.qkv.{p}",
        (
            "model.layers.{i}.self_attn.q_proj.{p}",
            "model.layers.{i}.self_attn.k_proj.{p}",
            "model.layers.{i}.self_attn.v_proj.{p}",
        ),
    ),
    Rule("decoder.layers.{i}.attention.q_norm.weight", "model.layers.{i}.self_attn.q_norm.weight"),
    Rule("decoder.layers.{i}.attention.k_norm.weight", "model.layers.{i}.self_attn.k_norm.weight"),
    Rule("decoder.layers.{i}.attention.out.{p}", "model.layers.{i}.self_attn.o_proj.{p}"),
    Rule("decoder.layers.{i}.ffn_residual.norm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
    Rule(
        "decoder.layers.{i}.ffn.gate_up.{p}",
        ("model.layers.{i}.mlp.gate_proj.{p}", "model.layers.{i}.mlp.up_proj.{p}"),
    ),
    Rule("decoder.layers.{i}.ffn.down.{p}", "model.layers.{i}.mlp.down_proj.{p}"),
    Rule("decoder.norm.weight", "model.norm.weight"),
)
HEADS = {"lm": (Rule("head.out.weight", "lm_head.weight"),)}
COPIES = (Copy("lm_head.weight", of="model.embed_tokens.weight"),)
SKIPPED = ("*.rotary_emb.inv_freq",)
KINDS = {"position": ("rotary",), "ffn": ("swiglu", "geglu", "reglu"), "residual": ("pre",), "norm": ("rmsnorm",)}


def body(config: Config, attention: dict[str, Any]) -> dict[str, Any]:
    """The spec of a decoder of this family; `attention` has what the layout itself decides."""
    heads = config.need("num_attention_heads")
    return {
        "vocabulary": config.need("vocab_size"),
        "width": config.need("hidden_size"),
        "depth": config.need("num_hidden_layers"),
        "context": config.need("max_position_embeddings"),
        "attention": {
            "kind": "softmax",
            "heads": heads,
            "kv_heads": config.get("num_key_value_heads", heads),
            "dropout": config.get("attention_dropout", 0.0),
            **attention,
        },
        "position": rotary(config),
        "ffn": {
            **config.choose("hidden_act", GATES, "silu"),
            "hidden": config.need("intermediate_size"),
            "bias": config.get("mlp_bias", False),
        },
        "residual": {"kind": "pre", "std": config.get("initializer_range", 0.02), "scale_outputs": False},
        "norm": {"kind": "rmsnorm", "eps": config.get("rms_norm_eps", 1e-6)},
        "head": {"kind": "lm", "tied": config.get("tie_word_embeddings", False)},
    }


def body_config(model: Model) -> dict[str, Any]:
    """The config of a decoder of this family."""
    attention: Any = model.decoder[0].attention
    heads = {"num_key_value_heads": attention.kv_heads, "head_dim": attention.head_dim}
    return {**trunk_config(model), **heads}


def trunk_config(model: Model) -> dict[str, Any]:
    """The config of a decoder of this family, without the sizes of its attention."""
    layer: Any = model.decoder[0]
    head: Any = model.spec.head
    return {
        "vocab_size": model.spec.vocabulary,
        "hidden_size": model.spec.width,
        "num_hidden_layers": len(model.decoder),
        "num_attention_heads": layer.attention.heads,
        "intermediate_size": layer.ffn.hidden,
        "hidden_act": gate_name(layer.ffn),
        "max_position_embeddings": model.context,
        "rms_norm_eps": layer.norm.eps,
        "attention_dropout": layer.attention.dropout,
        "initializer_range": layer.residual.std,
        "tie_word_embeddings": head.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        **rotary_config(layer.position),
    }


def _spec(config: Config, head: str, shapes: Shapes | None) -> dict[str, Any]:
    bias = "all" if config.get("attention_bias", False) else "none"
    return body(config, {"head_dim": config.get("head_dim", None), "bias": bias})


def _config(model: Model) -> dict[str, Any]:
    layer: Any = model.decoder[0]
    if model.spec.width % layer.attention.heads:
        raise TorchstoneError(
            f"the llama layout has no place for width {model.spec.width}, which {layer.attention.heads} heads do not "
            "divide; it takes a multiple, whatever the head_dim"
        )
    return {**body_config(model), "attention_bias": layer.attention.bias == "all", "mlp_bias": layer.ffn.bias}


LAYOUT = Layout(
    model_type="llama",
    sides=("decoder",),
    architectures={"LlamaForCausalLM": "lm"},
    kinds=KINDS,
    spec=_spec,
    config=_config,
    rules=RULES,
    heads=HEADS,
    copies=COPIES,
    skipped=SKIPPED,
    prefix="model.",
)
