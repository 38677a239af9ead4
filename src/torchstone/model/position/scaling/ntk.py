"""NTK-aware scaling (as described in Peng et al. 2023, arXiv 2309.00071, eq. 16): a larger base.

The base becomes ``base * factor^(R / (R - 2))``: the lowest frequency is divided by the factor, the highest kept.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from torchstone.model.position.scaling import ScalingSpec

__all__ = ["NTKSpec"]


class NTKSpec(ScalingSpec):
    """The base raised so that the longest wavelength grows by the factor and the shortest stays."""

    paper: ClassVar[str] = "Peng et al. 2023, arXiv 2309.00071"

    def stretch(self, frequencies: torch.Tensor, base: float, turned: int, context: int) -> tuple[torch.Tensor, float]:
        if turned == 2:
            return frequencies, 1.0
        raised = base * self.factor ** (turned / (turned - 2))
        even = torch.arange(0, turned, 2, device=frequencies.device, dtype=frequencies.dtype)
        return raised ** (-even / turned), 1.0
