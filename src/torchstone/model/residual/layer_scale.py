"""LayerScale (Touvron et al. 2021, arXiv 2103.17239, section 2) with the first values of BEiT (Bao et al. 2022, arXiv
2106.08254, section 2.5): pre-norm whose sublayers enter through a learned vector each.

    x + gamma * f(norm(x)),   gamma = `scale` at first

Weights start normal with deviation `std`, cut at one deviation, and those that write to the stream in layer l (from 1)
divided by sqrt(2 l). After the last layer there is one norm, or none where what reads the stream has its own.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from torchstone.model.context import Context
from torchstone.model.residual import Residual, ResidualSpec
from torchstone.model.residual.pre import PreResidual
from torchstone.model.site import Initialise, Site

__all__ = ["LayerScaleResidual", "LayerScaleSpec", "cut_normal"]


def cut_normal(std: float, outputs: float = 1.0) -> Initialise:
    """Normal with mean 0, cut at one deviation; weights that write to the stream ("out", "down") times `outputs`."""

    def rule(weight: torch.Tensor, role: str, generator: torch.Generator) -> None:
        nn.init.trunc_normal_(weight, 0.0, std, -std, std, generator=generator)
        if role in ("out", "down"):
            weight.mul_(outputs)

    return rule


class LayerScaleSpec(ResidualSpec):
    """Pre-norm with a learned vector on what each sublayer writes: vision Transformers that are deep or pre-trained."""

    paper: ClassVar[str] = "Touvron et al. 2021, arXiv 2103.17239; Bao et al. 2022, arXiv 2106.08254"

    scale: float = Field(0.1, gt=0, le=10)
    """First value of gamma: 0.1 in BEiT's base size, 1e-5 in its large one."""
    final: bool = True
    """Whether there is a norm after the last layer."""

    def init(self, depths: tuple[int, int], side: Literal["encoder", "decoder"]) -> Initialise:
        return cut_normal(self.std)

    def rule(self, site: Site) -> Initialise:
        return cut_normal(self.std, 1.0 if site.layer is None else 1 / math.sqrt(2 * (site.layer + 1)))

    def build(self, site: Site, before_linear: bool = True) -> Residual:
        return LayerScaleResidual(site, self.scale, before_linear)

    def final_norm(self, site: Site) -> nn.Module:
        return site.norm() if self.final else nn.Identity()


class LayerScaleResidual(PreResidual):
    """``x + gamma * f(norm(x))``."""

    def __init__(self, site: Site, scale: float, before_linear: bool = True) -> None:
        super().__init__(site, before_linear)
        self.scale = scale
        self.gamma = nn.Parameter(torch.empty(site.width))

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        parameter.fill_(self.scale)

    def write(self, x: torch.Tensor, y: torch.Tensor, ctx: Context) -> torch.Tensor:
        return x + self.thin(self.gamma.to(y.dtype) * y, ctx)
