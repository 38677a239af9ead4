"""Llama 3.1's scaling (Dubey et al. 2024, arXiv 2407.21783, and the published reference code).

Wavelengths shorter than ``original / high`` are kept, longer than ``original / low`` are divided by the factor, and
between them the two are mixed linearly in the number of turns.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field

from torchstone.model.position.scaling import ScalingSpec

__all__ = ["Llama3Spec"]


class Llama3Spec(ScalingSpec):
    """Long wavelengths stretched by the factor, short ones kept, a mix between."""

    paper: ClassVar[str] = "Dubey et al. 2024, arXiv 2407.21783"

    original: int = Field(8192, ge=1)
    """Context length of the original training."""
    low: float = Field(1.0, gt=0)
    """Turns within the original context up to which a channel is divided by the factor."""
    high: float = Field(4.0, gt=0)
    """Turns within the original context from which on a channel is kept."""

    def stretch(self, frequencies: torch.Tensor, base: float, turned: int, context: int) -> tuple[torch.Tensor, float]:
        turns = self.original * frequencies / (2 * math.pi)
        kept = ((turns - self.low) / max(self.high - self.low, 1e-9)).clamp(0, 1)
        return frequencies * kept + frequencies / self.factor * (1 - kept), 1.0
