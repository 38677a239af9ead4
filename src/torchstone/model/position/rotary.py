"""Rotary positions (Su et al. 2021, arXiv 2104.09864, eq. 15): pair i of q and k turns by ``t * base^(-2i / R)``.

The score of a query and a key then depends on their distance alone. Scaling kinds stretch the angles for contexts
longer than those seen in training.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from torchstone.model.position import Position, PositionSpec, Rotation
from torchstone.model.position.scaling import ScalingSpec
from torchstone.spec import Part

__all__ = ["RotaryPosition", "RotarySpec"]


class RotarySpec(PositionSpec):
    """Rotation of queries and keys by an angle proportional to position."""

    gives: ClassVar[Literal["rotation"]] = "rotation"
    paper: ClassVar[str] = "Su et al. 2021, arXiv 2104.09864"

    base: float = Field(10000.0, gt=1)
    """Base of the geometric series of frequencies."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of each head's channels that turns."""
    interleaved: bool = False
    """Pair channels (2i, 2i + 1) as in the paper; False pairs (i, i + R/2), as published checkpoints do."""
    inclusive: bool = False
    """Frequencies reach 1 / base itself, as in RetNet; False ends one step before it, as in the paper."""
    scaling: Part[ScalingSpec] | None = None
    """How frequencies are stretched for long contexts."""

    def turned(self, dim: int) -> int:
        """R: how many channels of a head of `dim` turn."""
        return round(dim * self.fraction)

    def illegal(self, dim: int) -> str | None:
        turned = self.turned(dim)
        if turned < 2 or turned % 2:
            return f"rotary turns pairs of channels, and {self.fraction:g} of a head of {dim} is {turned}, not even"
        return None

    def build(self, dim: int, heads: int, width: int, context: int, causal: bool) -> Position:
        return RotaryPosition(self, dim, context)


class RotaryPosition(Position):
    """Has no parameters and no tables: angles are made at every forward from the positions that it has."""

    def __init__(self, spec: RotarySpec, dim: int, context: int) -> None:
        super().__init__()
        self.spec, self.turned, self.context = spec, spec.turned(dim), context

    def rotation(self, where_BT: torch.Tensor) -> Rotation:
        # float64 where the model is float64: conformance compares at 1e-8
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        even = torch.arange(0, self.turned, 2, device=where_BT.device, dtype=dtype)
        # the order of operations of published code: one bit of a frequency is an angle of 1e-3 at position 10,000
        steps = self.turned if not self.spec.inclusive else max(1, self.turned - 2)
        frequencies, size = 1.0 / self.spec.base ** (even / steps), 1.0
        if self.spec.scaling is not None:
            frequencies, size = self.spec.scaling.stretch(frequencies, self.spec.base, self.turned, self.context)
        angle_B1TR = where_BT[:, None, :, None].to(dtype) * frequencies
        return Rotation(angle_B1TR.cos() * size, angle_B1TR.sin() * size, self.spec.interleaved)
