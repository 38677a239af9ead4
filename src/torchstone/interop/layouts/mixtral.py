"""Mixtral: Mistral's decoder with experts in every layer (Jiang et al. 2024, arXiv 2401.04088).

Its balance loss is taken over all layers at once, ours in each; a config's weight of it is not read.
"""

from __future__ import annotations

from typing import Any

from torchstone.interop.layout import Config, Layout, Model, Rule, Shapes
from torchstone.interop.layouts.llama import COPIES, HEADS, KINDS, RULES, SKIPPED, body, body_config

__all__ = ["LAYOUT"]

_OURS, _THEIRS = "decoder.layers.{i}.ffn", "model.layers.{i}.block_sparse_moe"
_EXPERT = f"{_THEIRS}.experts.{{e}}"


def _spec(config: Config, head: str, shapes: Shapes | None) -> dict[str, Any]:
    given = {name: value for name, value in config.values.items() if value is not None}
    config = Config(config.model_type, {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, **given})
    config.only("router_jitter_noise", 0.0)
    spec = body(config, {"window": config.get("sliding_window", None), "head_dim": config.get("head_dim", None)})
    spec["ffn"] = {
        "kind": "moe",
        "experts": config.get("num_local_experts", 8),
        "active": config.get("num_experts_per_tok", 2),
        "hidden": spec["ffn"]["hidden"],
        "activation": spec["ffn"].get("activation", "silu"),
        "router": {"kind": "topk", "normalise": True},
    }
    return spec


def _config(model: Model) -> dict[str, Any]:
    layer: Any = model.decoder[0]
    return {
        **body_config(model),
        "sliding_window": layer.attention.window,
        "num_local_experts": layer.ffn.experts,
        "num_experts_per_tok": layer.ffn.active,
    }


LAYOUT = Layout(
    model_type="mixtral",
    sides=("decoder",),
    architectures={"MixtralForCausalLM": "lm"},
    kinds={**KINDS, "ffn": ("moe",), "router": ("topk",)},
    spec=_spec,
    config=_config,
    rules=(
        *RULES,
        Rule(f"{_OURS}.router.weight", f"{_THEIRS}.gate.weight"),
        Rule(f"{_OURS}.up.weight", (f"{_EXPERT}.w1.weight", f"{_EXPERT}.w3.weight")),
        Rule(f"{_OURS}.down.weight", f"{_EXPERT}.w2.weight"),
    ),
    heads=HEADS,
    copies=COPIES,
    skipped=SKIPPED,
    prefix="model.",
)
