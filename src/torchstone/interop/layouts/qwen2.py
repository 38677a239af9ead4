"""Qwen2: Llama's decoder with biases on queries, keys and values (Yang et al. 2024, arXiv 2407.10671). Qwen2.5 has
this layout too."""

from __future__ import annotations

from typing import Any

from torchstone.interop.layout import Config, Layout, Model, Shapes
from torchstone.interop.layouts._shared import windows_config, with_windows
from torchstone.interop.layouts.llama import COPIES, HEADS, KINDS, RULES, SKIPPED, body, body_config

__all__ = ["LAYOUT"]


def _spec(config: Config, head: str, shapes: Shapes | None) -> dict[str, Any]:
    return with_windows(body(config, {"head_dim": config.get("head_dim", None), "bias": "qkv"}), config)


def _config(model: Model) -> dict[str, Any]:
    return {**body_config(model), **windows_config(model)}


LAYOUT = Layout(
    model_type="qwen2",
    sides=("decoder",),
    architectures={"Qwen2ForCausalLM": "lm"},
    kinds=KINDS,
    spec=_spec,
    config=_config,
    rules=RULES,
    heads=HEADS,
    copies=COPIES,
    skipped=SKIPPED,
    prefix="model.",
)
