"""ALiBi (Press, Smith and Lewis 2021, arXiv 2108.12409): scores lowered in proportion to distance.

Head h of a power of two H has slope ``2^(-8 (h + 1) / H)``; other H take the slopes of the next lower power of two and
then every other slope of the next higher one, as the authors' code does.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch

from torchstone.model.position import Position, PositionSpec
from torchstone.model.tokens import Tokens

__all__ = ["AlibiPosition", "AlibiSpec", "slopes"]


class AlibiSpec(PositionSpec):
    """A fixed penalty on scores, linear in distance, with a slope per head."""

    gives: ClassVar[Literal["bias"]] = "bias"
    paper: ClassVar[str] = "Press, Smith and Lewis 2021, arXiv 2108.12409"

    def build(self, dim: int, heads: int, width: int, context: int, causal: bool) -> Position:
        return AlibiPosition(heads)


def slopes(heads: int) -> list[float]:
    """Slope of each head."""
    power = 2 ** math.floor(math.log2(heads))
    first = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    return first if power == heads else first + slopes(2 * power)[::2][: heads - power]


class AlibiPosition(Position):
    """Has no parameters; any distance exists."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.slopes = slopes(heads)

    def bias(self, q: Tokens, k: Tokens) -> torch.Tensor:
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        slope_H11 = torch.tensor(self.slopes, dtype=dtype, device=q.index.device)[:, None, None]
        distance_B1TS = (q.where[:, None, :, None] - k.where[:, None, None, :]).abs()
        return -slope_H11 * distance_B1TS.to(dtype)
