"""Layer norm (Ba, Kiros and Hinton 2016, arXiv 1607.06450): ``(x - mean) / sqrt(var + eps) * gain + bias``."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from torchstone.model.norm import NormSpec

__all__ = ["LayerNorm", "LayerNormSpec"]


class LayerNormSpec(NormSpec):
    """Layer norm with a gain and, unless switched off, a bias."""

    paper: ClassVar[str] = "Ba, Kiros and Hinton 2016, arXiv 1607.06450"

    gain: bool = True
    """Whether there is a learned gain per channel."""
    bias: bool = True
    """Whether there is a learned bias per channel."""

    def build(self, width: int) -> nn.Module:
        return LayerNorm(width, self)


class LayerNorm(nn.Module):
    """(..., D) -> (..., D)."""

    def __init__(self, width: int, spec: LayerNormSpec) -> None:
        super().__init__()
        self.eps, self.shape = spec.eps, (width,)
        self.weight = nn.Parameter(torch.empty(width)) if spec.gain else None
        self.bias = nn.Parameter(torch.empty(width)) if spec.bias else None

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        parameter.fill_(1.0 if name == "weight" else 0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.shape, weight, bias, self.eps)
