"""RoBERTa: BERT's encoder trained longer, with one token type (Liu et al. 2019, arXiv 1907.11692), under a masked-LM
head or a classifier.

Its positions count from the id of padding plus one, so the first two rows of the published table stand for no position:
they are left out when it is read, and are zeros when it is written. Positions count no padding, as ours do not.
`layout` serves the encoders that share all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchstone.interop.layout import Config, Copy, Layout, Model, Rule, Shapes
from torchstone.interop.layouts._shared import After, classes
from torchstone.interop.layouts.bert import KINDS, body, body_config, rules

__all__ = ["LAYOUT", "layout"]

_PADDING = 1
"""Id of padding in every published vocabulary of this layout."""
_UNUSED = _PADDING + 1


def _spec(config: Config, head: str, shapes: Shapes | None) -> dict[str, Any]:
    config.only("pad_token_id", _PADDING)
    heads: dict[str, dict[str, Any]] = {
        "mlm": {"tied": config.get("tie_word_embeddings", True), "activation": "gelu"},
        "classification": {"classes": classes(config), "pool": "first", "pooler": True, "activation": "tanh"},
    }
    spec = body(config, {"kind": head, **heads[head]})
    return {**spec, "context": spec["context"] - _UNUSED}


def _config(model: Model) -> dict[str, Any]:
    return {
        **body_config(model),
        "max_position_embeddings": model.context + _UNUSED,
        "pad_token_id": _PADDING,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def layout(model_type: str, architectures: Mapping[str, str]) -> Layout:
    """The layout under another name."""
    return Layout(
        model_type=model_type,
        sides=("encoder",),
        architectures=architectures,
        kinds=KINDS,
        spec=_spec,
        config=_config,
        rules=(
            *rules("roberta"),
            Rule("encoder.positions.learned.weight", "roberta.embeddings.position_embeddings.weight", After(_UNUSED)),
        ),
        heads={
            "mlm": (
                Rule("head.transform.{p}", "lm_head.dense.{p}"),
                Rule("head.norm.{p}", "lm_head.layer_norm.{p}"),
                Rule("head.out.weight", "lm_head.decoder.weight"),
                Rule("head.bias", "lm_head.decoder.bias"),
            ),
            "classification": (
                Rule("head.pooler.{p}", "classifier.dense.{p}"),
                Rule("head.out.{p}", "classifier.out_proj.{p}"),
            ),
        },
        copies=(
            Copy("lm_head.decoder.weight", of="roberta.embeddings.word_embeddings.weight"),
            # the same parameter under two names; where it is not tied, the decoder's is the one that is used
            Copy("lm_head.bias", of="lm_head.decoder.bias", equal=False, written=True),
        ),
        skipped=("roberta.embeddings.position_ids", "roberta.pooler.dense.*"),
        prefix="roberta.",
    )


LAYOUT = layout("roberta", {"RobertaForMaskedLM": "mlm", "RobertaForSequenceClassification": "classification"})
