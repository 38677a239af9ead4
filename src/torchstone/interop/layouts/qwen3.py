"""Qwen3: Llama's decoder with a norm per head on queries and keys, heads of any size, and windows in some layers
(Yang et al. 2025, arXiv 2505.09388)."""

from __future__ import annotations

from typing import Any

from torchstone.interop.layout import Config, Layout, Model, Shapes
from torchstone.interop.layouts._shared import windows_config, with_windows
from torchstone.interop.layouts.llama import COPIES, HEADS, KINDS, RULES, SKIPPED, body, body_config

__all__ = ["LAYOUT"]


def _spec(config: Config, head: str, shapes: Shapes | None) -> dict[str, Any]:
    attention = {
        "head_dim": config.get("head_dim", 128),
        "bias": "all" if config.get("attention_bias", False) else "none",
        "qk_norm": True,
    }
    return with_windows(body(config, attention), config)


def _config(model: Model) -> dict[str, Any]:
    layer: Any = model.decoder[0]
    return {**body_config(model), "attention_bias": layer.attention.bias == "all", **windows_config(model)}


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
