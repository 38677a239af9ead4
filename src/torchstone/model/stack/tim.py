"""TIM, Transformers with independent mechanisms (Lamb et al. 2021, arXiv 2103.00336).

    plain, plain, mechanisms, ..., mechanisms, plain

Layers in the middle are of mechanisms (`torchstone.model.block.mechanisms`): each slice of the stream has a layer of
its own, a competition shares out how much attention may change each, and an attention across them at each position
lets them communicate. Their matrices are block-diagonal, so such a layer has as many times fewer parameters as it has
mechanisms. The first layers and the last are the model's own and see the whole stream.

Attention and feed-forward are the model's, with their heads and hidden units shared out; each mechanism's attention is
one by itself, so any kind will do, and keeps a decode state and score biases of its own. With residual post a layer is
that of the paper. With others it is the same with norms elsewhere: with pre, what a mechanism, the competition and the
communication read is normed by slice, and only the norm after the last layer is over the whole stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from torchstone.errors import TorchstoneError
from torchstone.model.block.mechanisms import CommunicationSpec, MechanismsSpec
from torchstone.model.stack import LayerPlan, LayerSpec, StackSpec

__all__ = ["TimSpec"]


class TimSpec(StackSpec):
    """Layers in the middle are cut into independent mechanisms that compete and communicate."""

    paper: ClassVar[str] = "Lamb et al. 2021, arXiv 2103.00336"

    mechanisms: int = Field(2, ge=1)
    """Slices of the stream with parameters of their own; a divisor of the width and of the heads."""
    plain_first: int = Field(2, ge=0)
    """Layers before those of mechanisms."""
    plain_last: int = Field(1, ge=0)
    """Layers after them."""
    competition: Literal["softmax", "scaled", "none"] = "softmax"
    """What an update from attention is multiplied by: its mechanism's share, that times mechanisms, or nothing."""
    communication: CommunicationSpec | None = CommunicationSpec()
    """Attention across mechanisms: heads, head_dim, place (after_ffn or before_ffn); None leaves it out."""

    def plan(self, layers: Sequence[LayerSpec], width: int, causal: bool) -> tuple[LayerPlan, ...]:
        middle = range(self.plain_first, len(layers) - self.plain_last)
        if not middle:
            raise TorchstoneError(
                f"stack tim: plain_first is {self.plain_first} and plain_last {self.plain_last}, and of "
                f"{len(layers)} layers that leaves none to mechanisms"
            )
        placed = MechanismsSpec(
            mechanisms=self.mechanisms, competition=self.competition, communication=self.communication
        )
        plans = []
        for number, layer in enumerate(layers):
            if number not in middle:
                plans.append(LayerPlan(layer))
                continue
            if layer.block.kind != "sequential":
                raise TorchstoneError(
                    f"layer {number}: stack tim: a mechanism attends and then feeds forward, which is block sequential "
                    f"and not {layer.block.kind}"
                )
            if why := placed.illegal(layer, width):
                raise TorchstoneError(f"layer {number}: {why}")
            plans.append(LayerPlan(layer.model_copy(update={"block": placed})))
        return tuple(plans)
