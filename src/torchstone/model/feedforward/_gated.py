"""The gated feed-forward network (Shazeer 2020, arXiv 2002.05202): ``down(act(gate(x)) * up(x))``."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch

from torchstone.model.context import Aux, Context
from torchstone.model.feedforward import FeedForward, FeedForwardSpec
from torchstone.model.site import Site

__all__ = ["Gated", "GatedSpec"]


class GatedSpec(FeedForwardSpec):
    """Three projections; `hidden` defaults to 8/3 x width, rounded up to a multiple of 32."""

    paper: ClassVar[str] = "Shazeer 2020, arXiv 2002.05202"

    bias: bool = False
    """Whether the projections have a bias."""

    def act(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Activation of the gate."""
        raise NotImplementedError

    def build(self, site: Site) -> FeedForward:
        return Gated(self, site)


class Gated(FeedForward):
    """(B, T, D) -> (B, T, D). Gate and up are one product; their slices keep their roles."""

    def __init__(self, spec: GatedSpec, site: Site) -> None:
        super().__init__()
        hidden = spec.hidden or -(-8 * site.width // (3 * 32)) * 32
        self.act, self.dropout = spec.act(), site.dropout
        self.gate_up = site.linear(site.width, (hidden, hidden), ("gate", "up"), bias=spec.bias)
        self.inner_norm = site.inner_norm(hidden)
        self.down = site.linear(hidden, site.width, "down", bias=spec.bias)

    def forward(self, x_BTD: torch.Tensor, ctx: Context | None = None) -> tuple[torch.Tensor, Aux]:
        ctx = Context.alone(x_BTD) if ctx is None else ctx
        gate, up = self.gate_up(x_BTD).chunk(2, -1)
        hidden = ctx.tap("hidden", self.act(gate) * up)
        hidden = ctx.drop(self.inner_norm(hidden), self.dropout, "hidden")
        return ctx.tap("out", self.down(hidden)), {}
