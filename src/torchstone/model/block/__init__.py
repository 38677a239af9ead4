"""Block: which sublayers a layer has, in which order, around the stream.

    x_BTD, handoff, aux = block(x_BTD, ctx, state, given)

`state` maps a sublayer's name ("attention", "cross") to its decode state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from torchstone.model.attention import Attention
from torchstone.model.context import Aux, Context, Handoff
from torchstone.model.site import Site
from torchstone.model.state import PartState, Slot
from torchstone.spec import PartSpec, lazy_parts

if TYPE_CHECKING:
    from torchstone.model.stack import LayerSpec

__all__ = ["Block", "BlockSpec"]

__getattr__ = lazy_parts(__name__)


class BlockSpec(PartSpec):
    """Order of a layer's sublayers."""

    family: ClassVar[str] = "block"
    default_kind: ClassVar[str] = "sequential"
    takes_memory: ClassVar[bool] = True
    """Whether there is a place for a cross-attention."""

    def illegal(self, layer: LayerSpec, width: int) -> str | None:
        """Why these parts cannot stand in this order, in one sentence; None if they can."""
        return None

    def misplaced(self) -> str | None:
        """Why a layer cannot ask for it; None if it can."""
        return None

    def build(self, layer: LayerSpec, site: Site, memory_width: int | None) -> Block:
        """The module; with a memory, a cross-attention stands after the attention."""
        raise NotImplementedError


class Block(nn.Module):
    """What a block kind builds. `attentions` names its sublayers that may have decode state, by path within it."""

    attentions: tuple[str, ...] = ("attention",)

    def state_spec(self) -> dict[str, tuple[Slot, ...]]:
        """Slots by sublayer."""
        named = {name: self._attention(name).state_spec() for name in self.attentions}
        return {name: slots for name, slots in named.items() if slots}

    def prepare(self, ctx: Context) -> None:
        """Make what attentions share with other layers, outside compiled code."""
        for name in self.attentions:
            self._attention(name).prepare(ctx)

    def _attention(self, name: str) -> Attention:
        return self.get_submodule(name)  # type: ignore[return-value]

    def forward(
        self,
        x_BTD: torch.Tensor,
        ctx: Context,
        state: Mapping[str, PartState] | None = None,
        given: Handoff | None = None,
    ) -> tuple[torch.Tensor, Handoff | None, Aux]:
        """The stream after this layer (B, T, D), what later layers get, and sums for the objective."""
        raise NotImplementedError
