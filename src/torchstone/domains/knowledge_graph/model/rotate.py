"""RotatE (Sun et al. 2019, arXiv 1902.10197): a relation turns each pair of numbers of the head by an angle."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from torchstone.domains.knowledge_graph.model._scorer import Scorer, ScorerSpec
from torchstone.ops.rotate import rotate

__all__ = ["RotatE", "RotatESpec"]


class RotatESpec(ScorerSpec):
    """A relation is a rotation in each plane of two numbers."""

    paper: ClassVar[str] = "Sun et al. 2019, arXiv 1902.10197"

    dim: int = Field(200, ge=2, le=2**20, multiple_of=2)
    """Numbers of an entity (D): twice the complex numbers of the paper."""

    @property
    def block_size(self) -> int:
        return 2

    def build(self) -> nn.Module:
        return RotatE(self)


class RotatE(Scorer):
    """`relation` (R, D/2): angles, as shares of pi, in units of the range of first values, as in the reference code."""

    def __init__(self, spec: RotatESpec) -> None:
        super().__init__(spec)
        self.relation = nn.Parameter(torch.empty(spec.sizes()[1], spec.dim // 2))

    def carry(self, x_BD: torch.Tensor, relation_B: torch.Tensor, seeks_head_B: torch.Tensor) -> torch.Tensor:
        angle_BP = self.relation[relation_B] * (math.pi / self.spec.spread)
        angle_BP = torch.where(seeks_head_B[:, None], -angle_BP, angle_BP)
        return rotate(x_BD, angle_BP.cos(), angle_BP.sin(), interleaved=True)
