"""Pre-norm with DeepNorm's weighted skip: ``alpha x + f(norm(x))``, and one norm after the last layer.

What TorchScale after its release 0.3.0 builds of a decoder whose config says ``deepnorm=True`` and nothing else (Ma et
al. 2022, arXiv 2211.13184): the switch leaves ``decoder_normalize_before`` as it is. As norms take
the scale of the stream out again, sublayer l counts alpha^-(l + 1) of what it does in plain pre-norm: early layers
outweigh late ones. It is here to go on with such models; for new ones there is `deepnorm`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from torchstone.model.context import Context
from torchstone.model.residual import Residual
from torchstone.model.residual.deepnorm import DeepNormSpec, constants
from torchstone.model.residual.pre import PreResidual
from torchstone.model.site import Site

__all__ = ["WeightedResidual", "WeightedSpec"]


class WeightedSpec(DeepNormSpec):
    """Pre-norm with DeepNorm's weighted skip and first values: TorchScale's decoder with `deepnorm` alone."""

    paper: ClassVar[str] = "Ma et al. 2022, arXiv 2211.13184"

    def build(self, site: Site, before_linear: bool = True) -> Residual:
        alpha = constants(site.depths, "decoder" if site.causal else "encoder")[0]
        return WeightedResidual(site, alpha if self.alpha is None else self.alpha, before_linear)

    def final_norm(self, site: Site) -> nn.Module:
        return site.norm()


class WeightedResidual(PreResidual):
    """``alpha x + f(norm(x))``."""

    def __init__(self, site: Site, alpha: float, before_linear: bool = True) -> None:
        super().__init__(site, before_linear)
        self.alpha = alpha

    def write(self, x: torch.Tensor, y: torch.Tensor, ctx: Context) -> torch.Tensor:
        return self.alpha * x + self.thin(y, ctx)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:.4f}"
