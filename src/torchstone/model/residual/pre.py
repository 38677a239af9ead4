"""Pre-norm (Xiong et al. 2020, arXiv 2002.04745): ``x + f(norm(x))``, and one norm after the last layer."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn

from torchstone.model.context import Context
from torchstone.model.residual import Residual, ResidualSpec, by_depth, normal
from torchstone.model.site import Initialise, Site

__all__ = ["PreResidual", "PreSpec"]


class PreSpec(ResidualSpec):
    """Norm before each sublayer, the stream itself never normalised, a final norm at the end."""

    paper: ClassVar[str] = "Xiong et al. 2020, arXiv 2002.04745"

    scale_outputs: bool = True
    """Start weights that write to the stream smaller by 1 / sqrt(sublayers), as GPT-2 does."""

    def init(self, depths: tuple[int, int], side: Literal["encoder", "decoder"]) -> Initialise:
        return normal(self.std, by_depth(depths, side) if self.scale_outputs else 1.0)

    def build(self, site: Site, before_linear: bool = True) -> Residual:
        return PreResidual(site, before_linear)

    def final_norm(self, site: Site) -> nn.Module:
        return site.norm()


class PreResidual(Residual):
    """``x + f(norm(x))``."""

    def __init__(self, site: Site, before_linear: bool = True) -> None:
        super().__init__(site)
        self.norm = site.norm(before_linear=before_linear)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)

    def write(self, x: torch.Tensor, y: torch.Tensor, ctx: Context) -> torch.Tensor:
        return x + self.thin(y, ctx)
