"""One part in somebody else's model: a plain module from (B, T, D) to (B, T, D)."""

from __future__ import annotations

import torch
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.model.attention import Attention, AttentionSpec
from torchstone.model.context import Aux, Context
from torchstone.model.feedforward import FeedForwardSpec
from torchstone.model.norm import NormSpec
from torchstone.model.position import Positions, PositionSpec
from torchstone.model.site import Site, initialise
from torchstone.spec import PartSpec, resolve

__all__ = ["Alone", "alone"]


class Alone(nn.Module):
    """A part with the context that it needs, made anew at every call: one sequence a row, no padding, no state.

    `aux` holds the sums (balance losses, counts) of the last forward, for parts that have any.
    """

    def __init__(self, part: nn.Module, positions: Positions, causal: bool) -> None:
        super().__init__()
        self.part, self.positions, self.causal = part, positions, causal
        self.aux: Aux = {}

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        if isinstance(self.part, Attention):
            y_BTD, _, self.aux = self.part(x_BTD, Context.alone(x_BTD, self.causal, self.positions))
            return y_BTD
        out = self.part(x_BTD)
        if isinstance(out, tuple):
            y_BTD, self.aux = out
            return y_BTD
        return out


def alone(
    spec: PartSpec,
    width: int,
    *,
    causal: bool = True,
    position: PositionSpec | str | None = None,
    context: int = 2048,
    seed: int = 0,
) -> Alone:
    """A part of its own, initialised.

    Args:
        spec: an attention, a feed-forward or a norm.
        width: D.
        causal: whether an attention sees no later token.
        position: how order enters an attention; None gives no position.
        context: positions that tables hold.
        seed: seed of the initial weights.

    Raises:
        TorchstoneError: the sizes do not go together, or a part of this family has no use by itself.
    """
    if isinstance(position, str):
        position = resolve("position", position)()  # type: ignore[assignment]
    positions = Positions(context, causal)
    site = Site(width=width, causal=causal, position_spec=position, positions=positions)  # type: ignore[arg-type]
    if isinstance(spec, AttentionSpec):
        from torchstone.model.stack import LayerSpec

        layer = LayerSpec(attention=spec, position=position or resolve("position", "none")())
        reason = spec.misplaced() or spec.illegal(layer, width)
        if reason is None and spec.causal_only and not causal:
            reason = f"attention {spec.kind} has no bidirectional form"
        if reason is None and layer.position.causal_only and not causal:
            reason = f"position {layer.position.kind} has no bidirectional form"
        if reason is not None:
            raise TorchstoneError(reason)
    elif isinstance(spec, NormSpec):
        return initialise(Alone(spec.build(width), positions, causal), seed)  # type: ignore[return-value]
    elif not isinstance(spec, FeedForwardSpec):
        raise TorchstoneError(f"build: a {spec.family} has no use by itself; attention, ffn, norm and model have")
    return initialise(Alone(spec.build(site), positions, causal), seed)  # type: ignore[return-value]
