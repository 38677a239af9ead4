"""GPT-2: pre-norm decoder with learned positions, biases everywhere and tanh-gelu (Radford et al. 2019).

Its projections are stored (inputs, outputs). Dropout of its own is on embeddings, probabilities and sublayer outputs;
the backbone's rate, taken from `resid_pdrop`, is on hidden units of the feed-forward as well.
"""

from __future__ import annotations

from typing import Any

from torchstone.interop.layout import TRANSPOSED, Config, Copy, Layout, Model, Rule, Shapes
from torchstone.interop.layouts._shared import ACTIVATIONS, activation_name

__all__ = ["LAYOUT"]

RULES = (
    Rule("embedding.weight", "transformer.wte.weight"),
    Rule("decoder.positions.learned.weight", "transformer.wpe.weight"),
    Rule("decoder.layers.{i}.attention_residual.norm.{p}", "transformer.h.{i}.ln_1.{p}"),
    Rule("decoder.layers.{i}.attention.qkv.{p}", "transformer.h.{i}.attn.c_attn.{p}", TRANSPOSED),
    Rule("decoder.layers.{i}.attention.out.{p}", "transformer.h.{i}.attn.c_proj.{p}", TRANSPOSED),
    Rule("decoder.layers.{i}.ffn_residual.norm.{p}", "transformer.h.{i}.ln_2.{p}"),
    Rule("decoder.layers.{i}.ffn.up.{p}", "transformer.h.{i}.mlp.c_fc.{p}", TRANSPOSED),
    Rule("decoder.layers.{i}.ffn.down.{p}", "transformer.h.{i}.mlp.c_proj.{p}", TRANSPOSED),
    Rule("decoder.norm.{p}", "transformer.ln_f.{p}"),
)


def _spec(config: Config, head: str, shapes: Shapes | None) -> dict[str, Any]:
    config.only("scale_attn_by_inverse_layer_idx", False)
    config.only("add_cross_attention", False)
    width = config.need("n_embd")
    return {
        "vocabulary": config.need("vocab_size"),
        "width": width,
        "depth": config.need("n_layer"),
        "context": config.need("n_positions"),
        "attention": {
            "kind": "softmax",
            "heads": config.need("n_head"),
            "scale": None if config.get("scale_attn_weights", True) else 1.0,
            "bias": "all",
            "dropout": config.get("attn_pdrop", 0.1),
        },
        "position": {"kind": "learned", "std": config.get("initializer_range", 0.02)},
        "ffn": {
            "kind": "mlp",
            "hidden": config.get("n_inner", 4 * width),
            "activation": config.choose("activation_function", ACTIVATIONS, "gelu_new"),
            "bias": True,
        },
        "residual": {"kind": "pre", "std": config.get("initializer_range", 0.02)},
        "norm": {"kind": "layernorm", "eps": config.get("layer_norm_epsilon", 1e-5)},
        "dropout": config.get("resid_pdrop", 0.1),
        "head": {"kind": "lm", "tied": config.get("tie_word_embeddings", True)},
    }


def _config(model: Model) -> dict[str, Any]:
    layer: Any = model.decoder[0]
    head: Any = model.spec.head
    return {
        "vocab_size": model.spec.vocabulary,
        "n_positions": model.context,
        "n_embd": model.spec.width,
        "n_layer": len(model.decoder),
        "n_head": layer.attention.heads,
        "n_inner": layer.ffn.hidden,
        "activation_function": activation_name(layer.ffn.activation),
        "layer_norm_epsilon": layer.norm.eps,
        "scale_attn_weights": layer.attention.scale != 1.0,
        "initializer_range": layer.residual.std,
        "attn_pdrop": layer.attention.dropout,
        "resid_pdrop": model.spec.dropout,
        "embd_pdrop": model.spec.dropout,
        "tie_word_embeddings": head.tied,
        "bos_token_id": None,
        "eos_token_id": None,
    }


LAYOUT = Layout(
    model_type="gpt2",
    sides=("decoder",),
    architectures={"GPT2LMHeadModel": "lm"},
    kinds={"position": ("learned",), "ffn": ("mlp",), "residual": ("pre",), "norm": ("layernorm",)},
    spec=_spec,
    config=_config,
    rules=RULES,
    heads={"lm": (Rule("head.out.weight", "lm_head.weight"),)},
    copies=(Copy("lm_head.weight", of="transformer.wte.weight"),),
    skipped=("*.attn.bias", "*.attn.masked_bias"),  # causal masks, kept as buffers by early versions
    prefix="transformer.",
)
