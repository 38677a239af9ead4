"""Head: turns the last hidden states into logits.

Shapes: B rows, T tokens, D width, V vocabulary, E width of the embedding's vectors (D, unless its spec says otherwise).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from torchstone.model.site import Site
from torchstone.model.tokens import Tokens
from torchstone.spec import PartSpec, lazy_parts

__all__ = ["Head", "HeadSpec", "Product", "VocabularyHead"]

__getattr__ = lazy_parts(__name__)


class HeadSpec(PartSpec):
    """What stands at the output."""

    family: ClassVar[str] = "head"
    default_kind: ClassVar[str] = "lm"
    over_vocabulary: ClassVar[bool] = False
    """Whether its logits are over the vocabulary."""
    any_table: ClassVar[bool] = False
    """Whether, tied, it takes an embedding's matrix of another width than the stream's."""

    def build(self, site: Site, vocabulary: int | None) -> Head:
        """The module."""
        raise NotImplementedError


class Head(nn.Module):
    """What a head kind builds."""

    def forward(self, h_BTD: torch.Tensor, tokens: Tokens, table_VE: torch.Tensor | None) -> torch.Tensor:
        """Logits: (B, T, V) over the vocabulary, (B, T, classes) or (B, classes). `table_VE`: the embedding's."""
        raise NotImplementedError


@dataclass(frozen=True)
class Product:
    """A vocabulary head taken apart, ``softcap(h weight^T + bias)``, so that a loss need not hold all logits."""

    h: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None

    def logits(self) -> torch.Tensor:
        """(..., V)."""
        z = F.linear(self.h, self.weight, self.bias)
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


class VocabularyHead(Head):
    """A head over the vocabulary, whose weight is its own or the embedding's."""

    def product(self, h: torch.Tensor, table_VE: torch.Tensor | None) -> Product:
        """Operands of the product for hidden states (..., D)."""
        raise NotImplementedError

    def forward(self, h_BTD: torch.Tensor, tokens: Tokens, table_VE: torch.Tensor | None) -> torch.Tensor:
        return self.product(h_BTD, table_VE).logits()
