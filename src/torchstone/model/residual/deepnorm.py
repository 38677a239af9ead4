"""DeepNorm (Wang et al. 2022, arXiv 2203.00555, figure 2): ``norm(alpha x + f(x))``, and weights to match.

Post-norm whose skip is weighted up by alpha > 1 and whose value path starts smaller by beta < 1, both functions of the
depths alone. For a stack of sublayers l whose values and outputs have scales v_l and w_l, the change of the output
under a step that changes their parameters from theta_l to theta*_l is bounded by (section 4 of the paper)

    sum over l of  sqrt(v_l^2 + w_l^2) / alpha_l * |theta*_l - theta_l|

and the constants keep that bound where it is, however deep the stack: with v = w = beta, ``2 N (v^2 + w^2) / alpha^2``
is 1 for N layers of two sublayers, and ``3 M (v^2 + w^2) / alpha^2`` for M layers of a decoder with a cross-attention.

    N encoder and M decoder layers      alpha                      beta
    encoder alone                       (2 N)^(1/4)                (8 N)^(-1/4)
    decoder alone                       (2 M)^(1/4)                (8 M)^(-1/4)
    encoder with a decoder              0.81 (N^4 M)^(1/16)        0.87 (N^4 M)^(-1/16)
    decoder with an encoder             (3 M)^(1/4)                (12 M)^(-1/4)

Projections start Xavier-normal. Beta is the gain of values, attention outputs and all matrices of the feed-forward, and
of gates, of which the paper has none; queries and keys have gain 1. Where an attention normalises what its values give,
as retention does, the scale of its values cancels and that of its output is left.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from torchstone.model.context import Context
from torchstone.model.residual import Residual, ResidualSpec, normal, xavier
from torchstone.model.residual.post import PostResidual
from torchstone.model.site import Initialise, Site

__all__ = ["DeepNormResidual", "DeepNormSpec", "constants"]


def constants(depths: tuple[int, int], side: Literal["encoder", "decoder"]) -> tuple[float, float]:
    """Alpha and beta of one side of a model with these layers (encoder, decoder; 0 where there is none)."""
    N, M = depths
    if side == "encoder" and N and M:
        return 0.81 * (N**4 * M) ** (1 / 16), 0.87 * (N**4 * M) ** (-1 / 16)
    if side == "decoder" and N:
        return (3 * M) ** 0.25, (12 * M) ** -0.25
    layers = N if side == "encoder" else M
    return (2 * layers) ** 0.25, (8 * layers) ** -0.25


class DeepNormSpec(ResidualSpec):
    """Post-norm with a weighted skip and first values that go with it, for stacks of hundreds of layers."""

    paper: ClassVar[str] = "Wang et al. 2022, arXiv 2203.00555"

    std: float = Field(0.02, gt=0, le=10)
    """Standard deviation of initial embeddings and heads; weights of layers start Xavier-normal."""
    alpha: float | None = Field(None, gt=0)
    """Weight of the skip; None takes the paper's for the depths of the model."""
    beta: float | None = Field(None, gt=0)
    """Gain of initial values, outputs and feed-forwards; None takes the paper's for the depths of the model."""

    def rule(self, site: Site) -> Initialise:
        return normal(self.std) if site.layer is None else super().rule(site)

    def init(self, depths: tuple[int, int], side: Literal["encoder", "decoder"]) -> Initialise:
        return xavier(constants(depths, side)[1] if self.beta is None else self.beta)

    def build(self, site: Site, before_linear: bool = True) -> Residual:
        alpha = constants(site.depths, "decoder" if site.causal else "encoder")[0]
        return DeepNormResidual(site, alpha if self.alpha is None else self.alpha)

    def final_norm(self, site: Site) -> nn.Module:
        return nn.Identity()


class DeepNormResidual(PostResidual):
    """``norm(alpha x + f(x))``."""

    def __init__(self, site: Site, alpha: float) -> None:
        super().__init__(site)
        self.alpha = alpha

    def write(self, x: torch.Tensor, y: torch.Tensor, ctx: Context) -> torch.Tensor:
        return self.norm(self.alpha * x + self.thin(y, ctx))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:.4f}"
