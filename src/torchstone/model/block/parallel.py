"""Attention and feed-forward side by side on one read of the stream (Chowdhery et al. 2022, arXiv 2204.02311)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch

from torchstone.model.block import Block, BlockSpec
from torchstone.model.context import Aux, Context, Handoff, add_aux
from torchstone.model.site import Site
from torchstone.model.state import PartState

if TYPE_CHECKING:
    from torchstone.model.stack import LayerSpec

__all__ = ["ParallelBlock", "ParallelSpec"]


class ParallelSpec(BlockSpec):
    """``x + attention(norm(x)) + ffn(norm(x))``: one read, one write."""

    takes_memory: ClassVar[bool] = False
    paper: ClassVar[str] = "Chowdhery et al. 2022, arXiv 2204.02311"

    def build(self, layer: LayerSpec, site: Site, memory_width: int | None) -> Block:
        return ParallelBlock(layer, site)


class ParallelBlock(Block):
    """(B, T, D) -> (B, T, D)."""

    def __init__(self, layer: LayerSpec, site: Site) -> None:
        super().__init__()
        self.attention = layer.attention.build(site)
        self.ffn = layer.ffn.build(site)
        self.residual = layer.residual.build(site)

    def forward(
        self,
        x_BTD: torch.Tensor,
        ctx: Context,
        state: Mapping[str, PartState] | None = None,
        given: Handoff | None = None,
    ) -> tuple[torch.Tensor, Handoff | None, Aux]:
        h = self.residual.read(x_BTD)
        mixed, handoff, aux = self.attention(h, ctx.inside("attention"), (state or {}).get("attention"), given)
        y, more = self.ffn(h, ctx.inside("ffn"))
        return self.residual.write(x_BTD, mixed + y, ctx.inside("residual")), handoff, add_aux(aux, more)
