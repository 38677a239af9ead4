"""YaRN (Peng et al. 2023, arXiv 2309.00071, section 3.2 to 3.4).

Channels that turn more than `fast` times within the original context keep their frequency, those that turn fewer than
`slow` times are divided by the factor, a ramp lies between; queries and keys are scaled so that attention keeps its
temperature: ``0.1 ln(factor) + 1``.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field

from torchstone.model.position.scaling import ScalingSpec

__all__ = ["YarnSpec"]


class YarnSpec(ScalingSpec):
    """Low frequencies divided by the factor, high ones kept, a ramp between, and a temperature."""

    paper: ClassVar[str] = "Peng et al. 2023, arXiv 2309.00071"

    original: int = Field(ge=1)
    """Context length of the original training."""
    fast: float = Field(32.0, gt=0)
    """Turns within the original context from which on a channel is kept (beta)."""
    slow: float = Field(1.0, gt=0)
    """Turns within the original context up to which a channel is divided by the factor (alpha)."""
    temperature: float | None = Field(None, gt=0)
    """Factor on rotated queries and keys; None is the paper's 0.1 ln(factor) + 1."""
    truncate: bool = True
    """Round the ends of the ramp outwards to whole channels."""

    def stretch(self, frequencies: torch.Tensor, base: float, turned: int, context: int) -> tuple[torch.Tensor, float]:
        def channel(turns: float) -> float:
            return turned * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = channel(self.fast), channel(self.slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, turned - 1)
        at = torch.arange(turned // 2, device=frequencies.device, dtype=frequencies.dtype)
        kept = 1 - ((at - low) / max(high - low, 1e-3)).clamp(0, 1)
        size = self.temperature
        if size is None:
            size = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        # kept is rounded before 1 - kept, as in published code: far out, one bit of a frequency is a visible angle
        return frequencies * kept + frequencies / self.factor * (1 - kept), size
