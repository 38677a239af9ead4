"""Mistral: Llama's decoder with one window for all layers, or none (Jiang et al. 2023, arXiv 2310.06825)."""

from __future__ import annotations

from typing import Any

from torchstone.interop.layout import Config, Layout, Model, Shapes
from torchstone.interop.layouts.llama import COPIES, HEADS, KINDS, RULES, SKIPPED, body, body_config

__all__ = ["LAYOUT"]


def _spec(config: Config, head: str, shapes: Shapes | None) -> dict[str, Any]:
    # here null is a value: later versions have no window, and without the key it is 4096
    window = config.values.get("sliding_window", 4096)
    return body(config, {"kv_heads": config.get("num_key_value_heads", 8), "window": window,
                         "head_dim": config.get("head_dim", None)})  # fmt: skip


def _config(model: Model) -> dict[str, Any]:
    layer: Any = model.decoder[0]
    return {**body_config(model), "sliding_window": layer.attention.window}


LAYOUT = Layout(
    model_type="mistral",
    sides=("decoder",),
    architectures={"MistralForCausalLM": "lm"},
    kinds=KINDS,
    spec=_spec,
    config=_config,
    rules=RULES,
    heads=HEADS,
    copies=COPIES,
    skipped=SKIPPED,
    prefix="model.",
)
