"""Sandwich norm (Ding et al. 2021, arXiv 2105.13290, section 2.4): ``x + norm(f(norm(x)))``, and a final norm."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from torchstone.model.context import Context
from torchstone.model.residual import Residual, ResidualSpec
from torchstone.model.site import Site

__all__ = ["SandwichResidual", "SandwichSpec"]


class SandwichSpec(ResidualSpec):
    """A norm before and a norm after each sublayer, inside the branch."""

    paper: ClassVar[str] = "Ding et al. 2021, arXiv 2105.13290"

    def build(self, site: Site, before_linear: bool = True) -> Residual:
        return SandwichResidual(site, before_linear)

    def final_norm(self, site: Site) -> nn.Module:
        return site.norm()


class SandwichResidual(Residual):
    """``x + norm_out(f(norm(x)))``."""

    def __init__(self, site: Site, before_linear: bool = True) -> None:
        super().__init__(site)
        self.norm = site.norm(before_linear=before_linear)
        self.norm_out = site.norm()

    def read(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)

    def write(self, x: torch.Tensor, y: torch.Tensor, ctx: Context) -> torch.Tensor:
        return x + self.thin(self.norm_out(y), ctx)
