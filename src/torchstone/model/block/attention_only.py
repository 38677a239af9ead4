"""A layer that is an attention and nothing else ; a study object of interpretability."""

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

__all__ = ["AttentionOnlyBlock", "AttentionOnlySpec"]


class AttentionOnlySpec(BlockSpec):
    """Attention, and cross-attention where there is a memory; no feed-forward."""

    def build(self, layer: LayerSpec, site: Site, memory_width: int | None) -> Block:
        return AttentionOnlyBlock(layer, site, memory_width)


class AttentionOnlyBlock(Block):
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

    def forward(
        self,
        x_BTD: torch.Tensor,
        ctx: Context,
        state: Mapping[str, PartState] | None = None,
        given: Handoff | None = None,
    ) -> tuple[torch.Tensor, Handoff | None, Aux]:
        inside = ctx.inside("attention")
        h = self.attention_residual.read(x_BTD)
        y, handoff, aux = self.attention(h, inside, (state or {}).get("attention"), given)
        x_BTD = self.attention_residual.write(x_BTD, y, inside)
        if self.cross is not None:
            inside = ctx.inside("cross")
            y, _, more = self.cross(self.cross_residual.read(x_BTD), inside, (state or {}).get("cross"))
            x_BTD, aux = self.cross_residual.write(x_BTD, y, inside), add_aux(aux, more)
        return x_BTD, handoff, aux
