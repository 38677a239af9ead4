"""YOCO, you only cache once (Sun et al. 2024, arXiv 2405.05254): two decoders, one set of keys and values.

The first layers, the self-decoder, have an attention whose decode state does not grow. From what they give, keys and
values are made once; the other layers, the cross-decoder, attend to those with queries of their own. So the cache is as
long as the text and one layer deep. Where only the last position's output is wanted, as of a prompt that is read, only
that position goes through the cross-decoder: of all others it needs the keys and values, and those are there already.

Shapes: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field

from torchstone.errors import TorchstoneError
from torchstone.model.attention import AttentionSpec
from torchstone.model.attention.shared_kv import SharedKeysValues, SharedKVSpec
from torchstone.model.context import Aux, Context, add_aux
from torchstone.model.site import Site
from torchstone.model.stack import LayerPlan, LayerSpec, Stack, StackSpec
from torchstone.model.state import PartState, Slot
from torchstone.model.tokens import pick
from torchstone.spec import Part, part

__all__ = ["YocoSpec", "YocoStack"]


class YocoSpec(StackSpec):
    """First layers of constant decode state, then layers that all attend to one set of keys and values."""

    paper: ClassVar[str] = "Sun et al. 2024, arXiv 2405.05254"

    self_layers: int | None = Field(None, ge=1)
    """Layers of the self-decoder; None means half of all, rounded down."""
    self_attention: Part[AttentionSpec] = part("gated_retention", "attention")
    """Their attention, of a kind whose decode state does not grow. The model's own is that of the other layers."""

    def first(self, depth: int) -> int:
        """Number of the first layer of the cross-decoder.

        Raises:
            TorchstoneError: one of the two decoders has no layer.
        """
        first = depth // 2 if self.self_layers is None else self.self_layers
        if not 1 <= first < depth:
            found = "" if self.self_layers is None else f"stack.self_layers is {first} and "
            raise TorchstoneError(f"stack yoco: each of its two decoders needs a layer, and {found}depth is {depth}")
        return first

    def plan(self, layers: Sequence[LayerSpec], width: int, causal: bool) -> tuple[LayerPlan, ...]:
        if not causal:
            raise TorchstoneError("stack yoco: its layers are causal; it has no encoder, alone or beside a decoder")
        first, attention, reason = self.first(len(layers)), layers[-1].attention, None
        if any(layer.attention != attention for layer in layers):
            reason = "attention cannot differ by layer; that of the first layers is stack.self_attention"
        elif any(layer.position != layers[-1].position for layer in layers[first:]):
            reason = f"position cannot differ by layer from layer {first} on, as keys are turned once for all"
        elif attention.kind != "softmax":
            reason = f"attention is that of the cross-decoder's layers and must be softmax, not {attention.kind}"
        elif getattr(attention, "window", None) is not None:
            reason = "attention.window: layers of the cross-decoder see all tokens; set stack.self_attention's"
        elif self.self_attention.grows:
            reason = (
                f"stack.self_attention: the decode state of {self.self_attention.kind} with these fields grows with "
                "the text; the first layers need one of constant size, as gated_retention, or softmax with a window"
            )
        if reason:
            raise TorchstoneError(f"stack yoco: {reason}")
        fields = {name: value for name, value in attention.dump().items() if name != "kind"}
        shared = SharedKVSpec(**fields)
        plans = []
        for number, layer in enumerate(layers):
            mine = layer.model_copy(update={"attention": self.self_attention if number < first else shared})
            if number < first and (why := self.self_attention.misplaced() or mine.illegal(width)):
                raise TorchstoneError(f"stack.self_attention: {why}")
            if number >= first and (why := mine.illegal(width)):
                raise TorchstoneError(f"stack yoco: {why}")
            plans.append(LayerPlan(mine))
        return tuple(plans)

    def build(self, layers: Sequence[LayerSpec], site: Site, context: int, memory_width: int | None) -> Stack:
        plans = self.plan(layers, site.width, site.causal)
        return YocoStack(plans, site, context, self.first(len(layers)))


class YocoStack(Stack):
    """The one part with a growing decode state is `keys_values`."""

    def __init__(self, plans: Sequence[LayerPlan], site: Site, context: int, first: int) -> None:
        super().__init__(plans, site, context, None)
        self.first = first
        shared = plans[first].spec.attention
        assert isinstance(shared, SharedKVSpec)
        self.keys_values = SharedKeysValues(shared, self.site(plans[first], site))

    def state_spec(self) -> dict[str, tuple[Slot, ...]]:
        return {**super().state_spec(), "keys_values": self.keys_values.state_spec()}

    def prepare(self, ctx: Context) -> None:
        for layer in self.blocks[: self.first]:
            layer.prepare(ctx)
        self.keys_values.prepare(ctx)

    def forward(
        self, x_BTD: torch.Tensor, ctx: Context, parts: Mapping[str, PartState] | None = None, last: bool = False
    ) -> tuple[torch.Tensor, Aux]:
        last = last and x_BTD.shape[1] > 1
        at_B = ctx.q.newest(x_BTD.shape[0]) if last else None
        late = ctx.newest(at_B) if last else ctx
        for layer in self.blocks[self.first :]:  # here, because `prepare` does not know whose queries there will be
            layer.prepare(late)
        x_BTD, aux = self.through(range(self.first), x_BTD, ctx, parts)
        held = None if parts is None else parts["keys_values"]
        given = self.keys_values(x_BTD, ctx.inside("keys_values"), held)
        x_BTD = pick(x_BTD, at_B) if last else x_BTD
        x_BTD, more = self.through(range(self.first, len(self.layers)), x_BTD, late, parts, given)
        return late.tap("norm", self.norm(x_BTD)), add_aux(aux, more)
