"""Attention, then (in a decoder with a memory) cross-attention, then feed-forward: the usual layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from torchstone.model.block import Block, BlockSpec
from torchstone.model.context import Aux, Context, Handoff, add_aux
from torchstone.model.site import Site
from torchstone.model.state import PartState

if TYPE_CHECKING:
    from torchstone.model.stack import LayerSpec

__all__ = ["SequentialBlock", "SequentialSpec"]


class SequentialSpec(BlockSpec):
    """Attention, cross-attention where there is a memory, feed-forward; each with a residual of its own."""

    def build(self, layer: LayerSpec, site: Site, memory_width: int | None) -> Block:
        return SequentialBlock(layer, site, memory_width)


class SequentialBlock(Block):
    """(B, T, D) -> (B, T, D)."""

    def __init__(self, layer: LayerSpec, site: Site, memory_width: int | None) -> None:
        super().__init__()
        self.attention = layer.attention.build(site)
        self.attention_residual = layer.residual.build(site)
        self.cross = None
        if memory_width is not None:
            self.attentions = ("attention", "cross")
            self.cross = layer.attention.build(replace(site, memory_width=memory_width))
            self.cross_residual = layer.residual.build(site)
        self.ffn = layer.ffn.build(site)
        self.ffn_residual = layer.residual.build(site)

    def forward(
        self,
        x_BTD: torch.Tensor,
        ctx: Context,
        state: Mapping[str, PartState] | None = None,
        given: Handoff | None = None,
    ) -> tuple[torch.Tensor, Handoff | None, Aux]:
        state = state or {}
        inside = ctx.inside("attention")
        h = self.attention_residual.read(x_BTD)
        y, handoff, aux = self.attention(h, inside, state.get("attention"), given)
        x_BTD = self.attention_residual.write(x_BTD, y, inside)
        if self.cross is not None:
            x_BTD, more = self.crossed(x_BTD, ctx, state.get("cross"))
            aux = add_aux(aux, more)
        x_BTD, more = self.fed(x_BTD, ctx)
        return x_BTD, handoff, add_aux(aux, more)

    def crossed(self, x_BTD: torch.Tensor, ctx: Context, state: PartState | None) -> tuple[torch.Tensor, Aux]:
        """The stream after the cross-attention."""
        assert self.cross is not None
        inside = ctx.inside("cross")
        y, _, aux = self.cross(self.cross_residual.read(x_BTD), inside, state)
        return self.cross_residual.write(x_BTD, y, inside), aux

    def fed(self, x_BTD: torch.Tensor, ctx: Context) -> tuple[torch.Tensor, Aux]:
        """The stream after the feed-forward."""
        inside = ctx.inside("ffn")
        y, aux = self.ffn(self.ffn_residual.read(x_BTD), inside)
        return self.ffn_residual.write(x_BTD, y, inside), aux
