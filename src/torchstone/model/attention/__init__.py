"""Attention: mixes across positions.

    y_BTD, handoff, aux = attention(x_BTD, ctx, state=None, given=None)

Shapes: B rows, T queries, S keys, D width, H heads, G key/value heads, K head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import nn

from torchstone.model.context import Aux, Context, Handoff
from torchstone.model.site import Site
from torchstone.model.state import PartState, Slot
from torchstone.spec import PartSpec, lazy_parts

if TYPE_CHECKING:
    from torchstone.model.stack import LayerSpec

__all__ = ["Attention", "AttentionSpec"]

__getattr__ = lazy_parts(__name__)


class AttentionSpec(PartSpec):
    """A way to mix across positions."""

    family: ClassVar[str] = "attention"
    default_kind: ClassVar[str] = "softmax"
    consumes: ClassVar[frozenset[str]] = frozenset({"rotation", "bias"})
    """What of a position it can use; an embedding added to the input needs no consent."""
    can_give: ClassVar[frozenset[str]] = frozenset()
    """What it can hand to later layers: "keys_values", "probs", "queries_keys", "block_max", "fresh"."""
    takes: ClassVar[frozenset[str]] = frozenset()
    """What it needs from an earlier layer; only stacks offer such kinds."""
    masks: ClassVar[frozenset[str]] = frozenset({"causal", "window"})
    """Names of the mask terms that it can honour, besides documents and padding."""
    crosses: ClassVar[bool] = False
    """Whether it can attend to a memory, as the cross-attention of an encoder-decoder."""
    offsets: ClassVar[bool] = False
    """Whether it adds `Tokens.offset` to the scores of a key, wherever among the keys that one stands."""
    causal_only: ClassVar[bool] = False
    """Whether it has no bidirectional form."""

    divided: ClassVar[tuple[str, ...]] = ("heads",)
    """Fields that are shared out where several of it stand side by side, each on a slice of the stream."""

    heads: int = Field(8, ge=1)
    """Number of query heads."""

    @property
    def grows(self) -> bool:
        """Whether its decode state grows with the text, as `state_spec` of its module will say."""
        return True

    def head_size(self, width: int) -> int:
        """Dimension of a query head."""
        return width // self.heads

    def illegal(self, layer: LayerSpec, width: int) -> str | None:
        """Why this kind cannot stand in a layer of these parts and this width, in one sentence; None if it can."""
        position = layer.position
        if position.gives not in ("nothing", "embedding", *self.consumes):
            return f"attention {self.kind} cannot use position {position.kind}: it has no use for a {position.gives}"
        return None

    def misplaced(self) -> str | None:
        """Why it cannot stand where no earlier layer hands it anything; None if it can."""
        if self.takes:
            wanted = ", ".join(sorted(self.takes))
            return f"attention {self.kind} needs {wanted} of another layer; only a stack can place it"
        return None

    def build(self, site: Site) -> Attention:
        """The module; a cross-attention where the site has a memory."""
        raise NotImplementedError


class Attention(nn.Module):
    """What an attention kind builds."""

    causal: bool = True
    """Whether a forward without a context is causal."""
    rings: ClassVar[bool] = False
    """Whether it works as well with rings in the place of its growing caches, under a mask of bounded reach."""

    def state_spec(self) -> tuple[Slot, ...]:
        """Slots of its decode state."""
        return ()

    def prepare(self, ctx: Context) -> None:
        """Make what this layer shares with others (rotation, mask) once a forward, outside compiled code."""

    def forward(
        self,
        x_BTD: torch.Tensor,
        ctx: Context | None = None,
        state: PartState | None = None,
        given: Handoff | None = None,
    ) -> tuple[torch.Tensor, Handoff | None, Aux]:
        """Mixed stream (B, T, D), what later layers get, and sums for the objective.

        Without a context: one sequence a row, no padding.
        """
        raise NotImplementedError

    def flops(self, context: int) -> float:
        """Multiply-adds times two per token besides the products with weights, at `context` keys."""
        return 0.0

    def decode_flops(self, context: int) -> float:
        """The same for one token after `context` others whose decode state is there."""
        return self.flops(context)
