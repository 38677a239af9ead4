"""XLM-RoBERTa: RoBERTa on a hundred languages (Conneau et al. 2019, arXiv 1911.02116)."""

from __future__ import annotations

from torchstone.interop.layouts.roberta import layout

__all__ = ["LAYOUT"]

LAYOUT = layout(
    "xlm-roberta", {"XLMRobertaForMaskedLM": "mlm", "XLMRobertaForSequenceClassification": "classification"}
)
