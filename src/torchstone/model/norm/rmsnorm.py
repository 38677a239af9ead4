"""Root-mean-square norm (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4): ``x / sqrt(mean(x^2) + eps) * gain``."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from torchstone.model.norm import NormSpec

__all__ = ["RMSNorm", "RMSNormSpec"]


class RMSNormSpec(NormSpec):
    """Root-mean-square norm with a gain and no mean."""

    paper: ClassVar[str] = "Zhang and Sennrich 2019, arXiv 1910.07467"

    gain: bool = True
    """Whether there is a learned gain per channel."""

    def build(self, width: int) -> nn.Module:
        return RMSNorm(width, self)


class RMSNorm(nn.Module):
    """(..., D) -> (..., D). The mean square is taken in at least float32."""

    def __init__(self, width: int, spec: RMSNormSpec) -> None:
        super().__init__()
        self.eps, self.shape = spec.eps, (width,)
        self.weight = nn.Parameter(torch.empty(width)) if spec.gain else None

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        parameter.fill_(1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.shape, weight, self.eps)
