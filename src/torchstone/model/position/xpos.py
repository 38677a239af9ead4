"""xPos (Sun et al. 2022, arXiv 2212.10554, section 3.1): rotary positions whose scores also fall with distance.

Pair i of a head of dimension R turns by ``t * base^(-2i / R)`` and its part of the score of query n and key m counts

    zeta_i^((n - m) / scale_base),  zeta_i = (2i / R + gamma) / (1 + gamma),

so that pairs that turn fast fade first and scores shrink with distance instead of oscillating. With gamma = 0.4 the
fastest pair has 0.2857 of its score left after `scale_base` tokens. The published 512 is half the length of the
training there; another length takes its own half.

The authors' code lays zeta^(n / B) on queries and zeta^(-m / B) on keys, which overflows float16 at m = 4,532, and
counts positions from the middle of every call, which keeps the numbers small and makes cached keys useless. Here keys
are cached rotated and without any factor, and a product takes the differences (`torchstone.ops.attention.Decay`).

Shapes: B rows, T queries, S keys, K channels of a head, R = K.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field

from torchstone.model.position import Position, PositionSpec, Rotation
from torchstone.model.tokens import Tokens
from torchstone.ops.attention import Decay

__all__ = ["XposPosition", "XposSpec"]


class XposSpec(PositionSpec):
    """Rotary positions whose scores also fall with distance, fast rotations first."""

    gives: ClassVar[Literal["decaying rotation"]] = "decaying rotation"
    causal_only: ClassVar[bool] = True
    paper: ClassVar[str] = "Sun et al. 2022, arXiv 2212.10554"

    scale_base: float = Field(512.0, gt=0)
    """Tokens after which the fastest pair has gamma / (1 + gamma) of its score left: half the training length."""
    gamma: float = Field(0.4, gt=0)
    """How much of the decay all pairs are spared; the larger, the nearer to rotary."""
    base: float = Field(10000.0, gt=1)
    """Base of the geometric series of frequencies."""
    interleaved: bool = False
    """Pair channels (2i, 2i + 1) as the authors' code does; False pairs (i, i + R/2)."""

    def illegal(self, dim: int) -> str | None:
        return f"xpos turns pairs of channels, and a head of {dim} is not even" if dim % 2 else None

    def build(self, dim: int, heads: int, width: int, context: int, causal: bool) -> Position:
        return XposPosition(self, dim)


class XposPosition(Position):
    """Has no parameters and no tables; any position exists."""

    def __init__(self, spec: XposSpec, dim: int) -> None:
        super().__init__()
        self.spec, self.dim = spec, dim

    def rotation(self, where_BT: torch.Tensor) -> Rotation:
        # in float64: in float32 an angle at position 100,000 is wrong by 0.004, and differently so at each position
        even = torch.arange(0, self.dim, 2, device=where_BT.device, dtype=torch.float64)
        angle_B1TR = where_BT[:, None, :, None] * self.spec.base ** (-even / self.dim)
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        return Rotation(angle_B1TR.cos().to(dtype), angle_B1TR.sin().to(dtype), self.spec.interleaved)

    def decay(self, q: Tokens, k: Tokens) -> Decay:
        gamma, dtype = self.spec.gamma, torch.promote_types(torch.get_default_dtype(), torch.float32)
        even = torch.arange(0, self.dim, 2, device=q.index.device, dtype=dtype)
        rate = -torch.log((even / self.dim + gamma) / (1 + gamma)) / self.spec.scale_base
        rate_K = rate.repeat_interleave(2) if self.spec.interleaved else rate.repeat(2)
        fastest = math.log((1 + gamma) / gamma) / self.spec.scale_base
        return Decay(rate_K, fastest, _places(q), _places(k))


def _places(tokens: Tokens) -> torch.Tensor:
    """Positions (B|1, T) that go on over the documents of a row, whose distances within one are those of positions:
    a block of queries that holds the end of one document and the beginning of the next still spans few places."""
    return tokens.where if tokens.start is None else tokens.where + tokens.start
