"""Post-norm (Vaswani et al. 2017, arXiv 1706.03762): ``norm(x + f(x))``; nothing after the last layer."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from torchstone.model.context import Context
from torchstone.model.residual import Residual, ResidualSpec
from torchstone.model.site import Site

__all__ = ["PostResidual", "PostSpec"]


class PostSpec(ResidualSpec):
    """Norm after each sublayer, on the stream itself: the original Transformer and BERT."""

    paper: ClassVar[str] = "Vaswani et al. 2017, arXiv 1706.03762"

    def build(self, site: Site, before_linear: bool = True) -> Residual:
        return PostResidual(site)

    def final_norm(self, site: Site) -> nn.Module:
        return nn.Identity()


class PostResidual(Residual):
    """``norm(x + f(x))``."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.norm = site.norm()

    def read(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def write(self, x: torch.Tensor, y: torch.Tensor, ctx: Context) -> torch.Tensor:
        return self.norm(x + self.thin(y, ctx))
