"""ELECTRA: BERT's encoder as a generator of replaced tokens and as their discriminator (Clark et al. 2020, arXiv
2003.10555).

Vectors of ids, positions and types may be of another size than the stream; the generator's head goes back to that size.
The discriminator's only logit is (B, T) there and (B, T, 1) here.
"""

from __future__ import annotations

from typing import Any

from torchstone.interop.layout import Config, Copy, Layout, Model, Rule, Shapes
from torchstone.interop.layouts._shared import ACTIVATIONS, classes
from torchstone.interop.layouts.bert import KINDS, body, body_config, rules

__all__ = ["LAYOUT"]


def _spec(config: Config, head: str, shapes: Shapes | None) -> dict[str, Any]:
    heads: dict[str, dict[str, Any]] = {
        "mlm": {"tied": config.get("tie_word_embeddings", True), "activation": "gelu"},
        "token_classification": {
            "classes": 1,
            "transform": True,
            "activation": config.choose("hidden_act", ACTIVATIONS, "gelu"),
        },
        "classification": {"classes": classes(config), "pool": "first", "pooler": True, "activation": "gelu"},
    }
    spec = body(config, {"kind": head, **heads[head]})
    return {**spec, "embedding": {**spec["embedding"], "size": config.get("embedding_size", 128)}}


def _config(model: Model) -> dict[str, Any]:
    size = model.spec.embedding.table_width(model.spec.width)
    return {**body_config(model), "embedding_size": size}


LAYOUT = Layout(
    model_type="electra",
    sides=("encoder",),
    architectures={
        "ElectraForPreTraining": "token_classification",
        "ElectraForMaskedLM": "mlm",
        "ElectraForSequenceClassification": "classification",
    },
    kinds=KINDS,
    spec=_spec,
    config=_config,
    rules=(
        *rules("electra"),
        Rule("embedding.project.{p}", "electra.embeddings_project.{p}"),
        Rule("encoder.positions.learned.weight", "electra.embeddings.position_embeddings.weight"),
    ),
    heads={
        "mlm": (
            Rule("head.transform.{p}", "generator_predictions.dense.{p}"),
            Rule("head.norm.{p}", "generator_predictions.LayerNorm.{p}"),
            Rule("head.out.weight", "generator_lm_head.weight"),
            Rule("head.bias", "generator_lm_head.bias"),
        ),
        "token_classification": (
            Rule("head.transform.{p}", "discriminator_predictions.dense.{p}"),
            Rule("head.out.{p}", "discriminator_predictions.dense_prediction.{p}"),
        ),
        "classification": (
            Rule("head.pooler.{p}", "classifier.dense.{p}"),
            Rule("head.out.{p}", "classifier.out_proj.{p}"),
        ),
    },
    copies=(Copy("generator_lm_head.weight", of="electra.embeddings.word_embeddings.weight"),),
    skipped=("electra.embeddings.position_ids",),
    prefix="electra.",
)
