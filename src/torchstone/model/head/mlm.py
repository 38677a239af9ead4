"""BERT's masked-language-modelling head (Devlin et al. 2018, arXiv 1810.04805, and its published code).

logits = norm(act(dense(h))) table^T + bias

Where the embedding's vectors have a size of their own, the transform goes down to that (ALBERT, ELECTRA's generator).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from torchstone.model.feedforward import ACTIVATIONS, Activation
from torchstone.model.head import HeadSpec, Product, VocabularyHead
from torchstone.model.linear import Linear
from torchstone.model.site import Site
from torchstone.spec import resolve

__all__ = ["MLMHead", "MLMSpec"]


class MLMSpec(HeadSpec):
    """A transform and then logits over the vocabulary, for predicting masked tokens."""

    over_vocabulary: ClassVar[bool] = True
    any_table: ClassVar[bool] = True
    paper: ClassVar[str] = "Devlin et al. 2018, arXiv 1810.04805"

    tied: bool = True
    """Use the embedding's matrix."""
    activation: Activation = "gelu"
    """Activation of the transform."""

    def build(self, site: Site, vocabulary: int | None) -> VocabularyHead:
        assert vocabulary is not None
        return MLMHead(self, site, vocabulary)


class MLMHead(VocabularyHead):
    """(B, T, D) -> (B, T, V)."""

    def __init__(self, spec: MLMSpec, site: Site, vocabulary: int) -> None:
        super().__init__()
        dense = resolve("linear", "dense")()
        self.activation = ACTIVATIONS[spec.activation]
        E = site.table_width or site.width
        self.transform = Linear(site.width, (E,), ("up",), True, dense, site.init)  # type: ignore[arg-type]
        self.norm = site.norm(E)
        self.out = None if spec.tied else Linear(E, (vocabulary,), ("head",), False, dense, site.init)  # type: ignore[arg-type]
        self.bias = nn.Parameter(torch.empty(vocabulary))

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        parameter.zero_()

    def product(self, h: torch.Tensor, table_VE: torch.Tensor | None) -> Product:
        h = self.norm(self.activation(self.transform(h)))
        weight = table_VE if self.out is None else self.out.weight
        assert weight is not None, "a tied head needs an embedding with a table"
        return Product(h, weight, self.bias.to(h.dtype))
