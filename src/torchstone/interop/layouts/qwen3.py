"""Qwen3: Llama's decoder with a norm per head on queries and keys, heads of any size, and windows in some layers
(Yang et al. 2025, arXiv 2505.09388)."""

from __future__ import annotations

from typing import Any

from torchstone.interop.layout import Config, Layout, Model, Shapes
from torchstone.interop.layouts.llama import COPIES, HEADS, KINDS, RULES, SKIPPED, body, body_config

__all__ = ["LAYOUT"]


def _spec(config: Config, head: str, shapes: Shapes | None) -> dict[str, Any]:
    attention = {
        "head_dim": config.get("head_dim", 128),
        "bias": "all" if config.get("attention_bias", False) else "none",
        "qk_norm": True,
    }
    spec = body(config, attention)
    at, depth = _windowed(config), spec["depth"]
    if at and len(at) == depth:
        spec["attention"]["window"] = config.need("sliding_window")
    elif at:
        spec["layers"] = [{"at": at, "attention": {"window": config.need("sliding_window")}}]
    return spec


def _windowed(config: Config) -> list[int]:
    """Numbers of the layers with a window: listed, or before version 4.50 all from `max_window_layers` on."""
    depth = config.need("num_hidden_layers")
    windowed = config.get("use_sliding_window", False) and config.get("sliding_window", 4096) is not None
    first = config.get("max_window_layers", 28) if windowed else depth
    default = ["full_attention"] * min(first, depth) + ["sliding_attention"] * max(0, depth - first)
    kinds = config.get("layer_types", default)
    for kind in kinds:
        Config(config.model_type, {"layer_types": kind}).choose(
            "layer_types", {"full_attention": 0, "sliding_attention": 0}, kind
        )
    return [number for number, kind in enumerate(kinds) if kind == "sliding_attention"]


def _config(model: Model) -> dict[str, Any]:
    attentions: list[Any] = [layer.attention for layer in model.decoder]
    windows = [attention.window for attention in attentions if attention.window is not None]
    return {
        **body_config(model),
        "use_sliding_window": bool(windows),
        "sliding_window": windows[0] if windows else None,
        # from here on; readers that know `layer_types` go by those
        "max_window_layers": next((i for i, attention in enumerate(attentions) if attention.window), len(attentions)),
        "layer_types": ["sliding_attention" if attention.window else "full_attention" for attention in attentions],
    }


LAYOUT = Layout(
    model_type="qwen3",
    sides=("decoder",),
    architectures={"Qwen3ForCausalLM": "lm"},
    kinds=KINDS,
    spec=_spec,
    config=_config,
    rules=RULES,
    heads=HEADS,
    copies=COPIES,
    skipped=SKIPPED,
    prefix="model.",
)
