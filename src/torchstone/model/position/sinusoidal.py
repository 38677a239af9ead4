"""Sinusoidal positions (Vaswani et al. 2017, arXiv 1706.03762, section 3.5).

p[2i] = sin(t / base^(2i / D)),  p[2i + 1] = cos(t / base^(2i / D))
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from torchstone.model.position import Position, PositionSpec

__all__ = ["SinusoidalPosition", "SinusoidalSpec"]


class SinusoidalSpec(PositionSpec):
    """Fixed sines and cosines of geometric wavelengths, added to the token embedding."""

    gives: ClassVar[Literal["embedding"]] = "embedding"
    paper: ClassVar[str] = "Vaswani et al. 2017, arXiv 1706.03762"

    base: float = Field(10000.0, gt=1)
    """Longest wavelength over 2 pi."""
    scale: float = Field(0.02, gt=0)
    """Factor on the waves, so that they start at the size of token embeddings; 1 is the paper's."""

    def build(self, dim: int, heads: int, width: int, context: int, causal: bool) -> Position:
        return SinusoidalPosition(width, self.base, self.scale)


class SinusoidalPosition(Position):
    """Has no parameters; any position exists."""

    def __init__(self, width: int, base: float, scale: float) -> None:
        super().__init__()
        self.width, self.base, self.scale = width, base, scale

    def embed(self, where_BT: torch.Tensor) -> torch.Tensor:
        even = torch.arange(0, self.width, 2, device=where_BT.device, dtype=torch.float64)
        angle = where_BT[..., None] * self.base ** (-even / self.width)
        waves = torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)[..., : self.width]
        return (self.scale * waves).to(torch.get_default_dtype())
