"""T5's relative bias (Raffel et al. 2019, arXiv 1910.10683, section 2.1): a learned number per head and distance.

Half the buckets hold one distance each, the other half grow logarithmically up to `far`; both directions get buckets of
their own in an encoder. One table serves all layers of a stack.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from torchstone.model.position import Position, PositionSpec
from torchstone.model.tokens import Tokens

__all__ = ["T5Position", "T5Spec"]


class T5Spec(PositionSpec):
    """A learned score bias per head and bucket of distance, one table for all layers."""

    gives: ClassVar[Literal["bias"]] = "bias"
    paper: ClassVar[str] = "Raffel et al. 2019, arXiv 1910.10683"

    buckets: int = Field(32, ge=4, multiple_of=4)
    """Number of distance buckets, both directions together."""
    far: int = Field(128, ge=2)
    """Distance from which on all share the last bucket."""
    std: float = Field(0.02, gt=0, le=10)
    """Standard deviation of initial biases."""

    def build(self, dim: int, heads: int, width: int, context: int, causal: bool) -> Position:
        return T5Position(self, heads, causal)


class T5Position(Position):
    """A table (buckets, H)."""

    def __init__(self, spec: T5Spec, heads: int, causal: bool) -> None:
        super().__init__()
        self.spec, self.causal = spec, causal
        self.weight = nn.Parameter(torch.empty(spec.buckets, heads))

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        nn.init.normal_(parameter, 0.0, self.spec.std, generator=generator)

    def bias(self, q: Tokens, k: Tokens) -> torch.Tensor:
        ahead_BTS = k.where[:, None, :] - q.where[:, :, None]
        return F.embedding(self._bucket(ahead_BTS), self.weight).permute(0, 3, 1, 2)

    def _bucket(self, ahead: torch.Tensor) -> torch.Tensor:
        buckets = self.spec.buckets
        first = torch.zeros_like(ahead)
        if self.causal:
            distance = (-ahead).clamp(min=0)
        else:
            buckets //= 2
            first = (ahead > 0) * buckets
            distance = ahead.abs()
        exact = buckets // 2
        # float32 as in the published code: a distance on the edge of a bucket must fall on the same side
        log = torch.log(distance.clamp(min=1).float() / exact) / math.log(max(self.spec.far / exact, 1 + 1e-6))
        grown = (exact + (log * (buckets - exact)).long()).clamp(max=buckets - 1)
        return first + torch.where(distance < exact, distance, grown)
