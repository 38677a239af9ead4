"""The two-layer feed-forward network (Vaswani et al. 2017, arXiv 1706.03762, eq. 2): ``down(act(up(x)))``."""

from __future__ import annotations

from typing import ClassVar

import torch

from torchstone.model.context import Aux, Context
from torchstone.model.feedforward import ACTIVATIONS, Activation, FeedForward, FeedForwardSpec
from torchstone.model.site import Site

__all__ = ["MLP", "MLPSpec"]


class MLPSpec(FeedForwardSpec):
    """Two projections with an activation between; `hidden` defaults to 4 x width."""

    paper: ClassVar[str] = "Vaswani et al. 2017, arXiv 1706.03762"

    activation: Activation = "gelu"
    """gelu (exact), gelu_tanh, relu, relu2 (squared relu) or silu."""
    bias: bool = False
    """Whether both projections have a bias."""

    def build(self, site: Site) -> FeedForward:
        return MLP(self, site)


class MLP(FeedForward):
    """(B, T, D) -> (B, T, D)."""

    def __init__(self, spec: MLPSpec, site: Site) -> None:
        super().__init__()
        hidden = spec.hidden or 4 * site.width
        self.activation, self.dropout = ACTIVATIONS[spec.activation], site.dropout
        self.up = site.linear(site.width, hidden, "up", bias=spec.bias)
        self.inner_norm = site.inner_norm(hidden)
        self.down = site.linear(hidden, site.width, "down", bias=spec.bias)

    def forward(self, x_BTD: torch.Tensor, ctx: Context | None = None) -> tuple[torch.Tensor, Aux]:
        ctx = Context.alone(x_BTD) if ctx is None else ctx
        hidden = ctx.tap("hidden", self.activation(self.up(x_BTD)))
        hidden = ctx.drop(self.inner_norm(hidden), self.dropout, "hidden")
        return ctx.tap("out", self.down(hidden)), {}
