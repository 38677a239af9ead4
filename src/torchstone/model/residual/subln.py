"""Sub-LN (Magneto; Wang et al. 2022, arXiv 2210.06423, section 2): pre-norm with a second norm inside each sublayer.

    attention      x + W_o norm(concat of heads),   q, k, v = W_{q,k,v} norm(x)
    feed-forward   x + W_2 norm(phi(W_1 norm(x)))

The second norm goes over all heads together, or over the hidden units after any gate, right before the projection that
writes to the stream. The scale of values and hidden units cancels in it, so their first values set by how much a step
changes them relatively: bigger weights, smaller changes. The paper's bound on the change of the output under a step
grows like ``ln(sublayers) / gamma^2``, and gamma^2 = ln(sublayers) keeps it where it is:

    N encoder and M decoder layers      gamma
    encoder alone                       sqrt(ln 2N)
    decoder alone                       sqrt(ln 2M)
    encoder with a decoder              sqrt(ln(3M) ln(2N) / 3)
    decoder with an encoder             sqrt(ln 3M)

Projections start Xavier-normal. Gamma is the gain of values, attention outputs and all matrices of the feed-forward,
and of gates; queries and keys have gain 1. A cross-attention has neither the second norm nor the gain, as in the
published code. The final norm of an encoder is what a decoder's cross-attentions read.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from torchstone.model.residual import Residual, ResidualSpec, normal, xavier
from torchstone.model.residual.pre import PreResidual
from torchstone.model.site import Initialise, Site

__all__ = ["SubLnSpec", "gain"]


def gain(depths: tuple[int, int], side: Literal["encoder", "decoder"]) -> float:
    """Gamma of one side of a model with these layers (encoder, decoder; 0 where there is none)."""
    N, M = depths
    if side == "encoder" and N and M:
        return math.sqrt(math.log(3 * M) * math.log(2 * N) / 3)
    if side == "decoder" and N:
        return math.sqrt(math.log(3 * M))
    return math.sqrt(math.log(2 * (N if side == "encoder" else M)))


class SubLnSpec(ResidualSpec):
    """Norm before each sublayer and before its output projection, and first values that go with it."""

    paper: ClassVar[str] = "Wang et al. 2022, arXiv 2210.06423"

    std: float = Field(0.02, gt=0, le=10)
    """Standard deviation of initial embeddings and heads; weights of layers start Xavier-normal."""
    gamma: float | None = Field(None, gt=0)
    """Gain of initial values, outputs and feed-forwards; None takes the paper's for the depths of the model."""

    def rule(self, site: Site) -> Initialise:
        if site.layer is None:
            return normal(self.std)
        return super().rule(site) if site.memory_width is None else xavier(1.0)

    def init(self, depths: tuple[int, int], side: Literal["encoder", "decoder"]) -> Initialise:
        return xavier(gain(depths, side) if self.gamma is None else self.gamma)

    def inner_norm(self, site: Site, width: int) -> nn.Module:
        return site.norm(width, before_linear=True) if site.memory_width is None else nn.Identity()

    def build(self, site: Site, before_linear: bool = True) -> Residual:
        return PreResidual(site, before_linear)

    def final_norm(self, site: Site) -> nn.Module:
        return site.norm()
