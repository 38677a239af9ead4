"""mT5: T5 1.1 on a hundred languages, with gated tanh-gelu and a head of its own (Xue et al. 2020, arXiv 2010.11934).

Hidden states are never scaled before the head. Published configs say that it is not tied; those of transformers 5
always say that it is, and the tensors tell.
"""

from __future__ import annotations

from typing import Any

from torchstone.interop.layout import Config, Layout, Shapes
from torchstone.interop.layouts.t5 import COPIES, HEADS, KINDS, RULES, SKIPPED, body, body_config

__all__ = ["LAYOUT"]


def _spec(config: Config, head: str, shapes: Shapes | None) -> dict[str, Any]:
    own_matrix = shapes is not None and "lm_head.weight" in shapes
    tied = config.get("tie_word_embeddings", False) and not own_matrix
    return body(config, "gated-gelu", {"kind": "lm", "tied": tied})


LAYOUT = Layout(
    model_type="mt5",
    sides=("encoder", "decoder"),
    architectures={"MT5ForConditionalGeneration": "lm"},
    kinds=KINDS,
    spec=_spec,
    config=body_config,
    rules=RULES,
    heads=HEADS,
    copies=COPIES,
    skipped=SKIPPED,
    free=frozenset({"context"}),
)
