"""Learned absolute positions (Gehring et al. 2017, arXiv 1705.03122; BERT, GPT-2): a vector per position, added."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from torchstone.model.position import Position, PositionSpec

__all__ = ["LearnedPosition", "LearnedSpec"]


class LearnedSpec(PositionSpec):
    """One learned vector per position, added to the token embedding."""

    gives: ClassVar[Literal["embedding"]] = "embedding"
    paper: ClassVar[str] = "Gehring et al. 2017, arXiv 1705.03122"

    std: float = Field(0.02, gt=0, le=10)
    """Standard deviation of initial vectors."""

    def build(self, dim: int, heads: int, width: int, context: int, causal: bool) -> Position:
        return LearnedPosition(context, width, self.std)


class LearnedPosition(Position):
    """A table (context, D). Positions beyond it do not exist: `limit` says so before a model runs into it."""

    def __init__(self, context: int, width: int, std: float) -> None:
        super().__init__()
        self.limit, self.std = context, std
        self.weight = nn.Parameter(torch.empty(context, width))

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        nn.init.normal_(parameter, 0.0, self.std, generator=generator)

    def embed(self, where_BT: torch.Tensor) -> torch.Tensor:
        return F.embedding(where_BT, self.weight)
