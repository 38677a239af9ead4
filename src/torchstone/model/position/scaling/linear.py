"""Position interpolation (Chen et al. 2023, arXiv 2306.15595): all angles divided by the factor."""

from __future__ import annotations

from typing import ClassVar

import torch

from torchstone.model.position.scaling import ScalingSpec

__all__ = ["LinearSpec"]


class LinearSpec(ScalingSpec):
    """All frequencies divided by the factor."""

    paper: ClassVar[str] = "Chen et al. 2023, arXiv 2306.15595"

    def stretch(self, frequencies: torch.Tensor, base: float, turned: int, context: int) -> tuple[torch.Tensor, float]:
        return frequencies / self.factor, 1.0
