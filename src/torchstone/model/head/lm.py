"""The language-modelling head: one product with the embedding's matrix (Press and Wolf 2016, arXiv 1608.05859) or its
own."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from torchstone.model.head import HeadSpec, Product, VocabularyHead
from torchstone.model.linear import Linear
from torchstone.model.site import Site
from torchstone.spec import resolve

__all__ = ["LMHead", "LMSpec"]


class LMSpec(HeadSpec):
    """Logits over the vocabulary at every position."""

    over_vocabulary: ClassVar[bool] = True
    paper: ClassVar[str] = "Press and Wolf 2016, arXiv 1608.05859"

    tied: bool = True
    """Use the embedding's matrix."""
    bias: bool = False
    """A bias per token; only for an untied head."""
    scale: bool = False
    """Multiply hidden states by 1 / sqrt(width) first, as T5 does with a tied head."""
    softcap: float | None = Field(None, gt=0)
    """Logits become cap * tanh(logit / cap) (Gemma 2, arXiv 2408.00118)."""

    def build(self, site: Site, vocabulary: int | None) -> VocabularyHead:
        assert vocabulary is not None
        return LMHead(self, site, vocabulary)


class LMHead(VocabularyHead):
    """(B, T, D) -> (B, T, V). Always a plain product, whatever the model's kind of linear."""

    def __init__(self, spec: LMSpec, site: Site, vocabulary: int) -> None:
        super().__init__()
        self.factor, self.softcap = site.width**-0.5 if spec.scale else 1.0, spec.softcap
        dense = resolve("linear", "dense")()
        self.out = None if spec.tied else Linear(site.width, (vocabulary,), ("head",), spec.bias, dense, site.init)  # type: ignore[arg-type]

    def product(self, h: torch.Tensor, table_VE: torch.Tensor | None) -> Product:
        h = h if self.factor == 1.0 else h * self.factor
        if self.out is not None:
            return Product(h, self.out.weight, self.out.bias, self.softcap)
        assert table_VE is not None, "a tied head needs an embedding with a table"
        return Product(h, table_VE, None, self.softcap)
