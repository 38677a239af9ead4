"""LongMem (Wang et al. 2023, arXiv 2306.07174): a backbone that remembers, and a side network that looks things up.

Side layer l stands beside r layers of the backbone, whose streams are H^0 .. H^L', and gets their difference on top of
its own output (equation 2)::

    x_0 = H^0,   x_{l+1} = side_l(x_l) + H^{r (l + 1)} - H^{r l}

so that side layers that add nothing leave the backbone's own output. The keys and values of one backbone layer go into
a `Bank`; the side layer beside it looks them up by a joint attention. The backbone is run without
dropout. Its final norm is the side network's.

`adapt: {kind: longmem}` makes this stack of a trained model, freezes the backbone and trains the side network.

Shapes: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.model.attention._joint import JointSpec
from torchstone.model.attention.softmax import SoftmaxSpec
from torchstone.model.bank import Bank
from torchstone.model.block import Block
from torchstone.model.context import Aux, Context, Handoff, add_aux
from torchstone.model.site import Gives, Site
from torchstone.model.stack import LayerPlan, LayerSpec, Stack, StackSpec
from torchstone.model.state import PartState, Slot
from torchstone.spec import Spec

__all__ = ["LongMemStack", "LongMemStackSpec", "MemorySpec"]


class MemorySpec(Spec):
    """What is remembered, and how much of it is looked up."""

    layer: int | None = Field(None, ge=1)
    """Layer of the backbone whose keys and values are remembered, counted from 1; None is three quarters up."""
    tokens: int = Field(65536, ge=1)
    """Tokens that a row remembers at most."""
    chunk: int = Field(4, ge=1)
    """Tokens that are looked up together."""
    retrieve: int = Field(64, ge=1)
    """Tokens that a query of a head looks up, a multiple of `chunk`."""
    index: Literal["exact", "flat", "hnsw"] = "exact"
    """What finds chunks: a comparison with all, or FAISS (extra `memory`), whose hnsw is not exact."""


class LongMemStackSpec(StackSpec):
    """A backbone, and a side network that reads its streams and looks up what it remembers."""

    paper: ClassVar[str] = "Wang et al. 2023, arXiv 2306.07174"

    reduction: int = Field(2, ge=1)
    """Layers of the backbone beside one of the side network."""
    memory: MemorySpec = MemorySpec()
    """What is remembered, and how much of it is looked up."""

    def beside(self, layers: int) -> int:
        """Number of the side layer that looks things up."""
        return (self.layer(layers) - 1) // self.reduction

    def layer(self, layers: int) -> int:
        """The layer that is remembered, counted from 1."""
        return self.memory.layer or max(1, 3 * layers // 4)

    def plan(self, layers: Sequence[LayerSpec], width: int, causal: bool) -> tuple[LayerPlan, ...]:
        memory, depth = self.memory, len(layers)
        reason = None
        if not causal:
            reason = "an encoder has no past to remember; it needs causal: true"
        elif depth % self.reduction:
            reason = f"reduction: {self.reduction} does not divide {depth} layers"
        elif self.layer(depth) > depth:
            reason = f"memory.layer: is {memory.layer}, the backbone has layers 1 to {depth}"
        elif memory.retrieve % memory.chunk:
            reason = f"memory.retrieve: {memory.retrieve} tokens are no multiple of chunks of {memory.chunk}"
        elif memory.tokens % memory.chunk:
            reason = f"memory.tokens: {memory.tokens} tokens are no multiple of chunks of {memory.chunk}"
        else:
            remembered, other = layers[self.layer(depth) - 1], self.source(layers, self.beside(depth))
            for layer in (remembered, other):
                if type(layer.attention) is not SoftmaxSpec:
                    reason = f"a memory needs the keys of attention softmax, not of {layer.attention.kind}"
            shapes = [
                (x.attention.head_size(width), getattr(x.attention, "kv_heads", None)) for x in (remembered, other)
            ]
            if reason is None and shapes[0] != shapes[1]:
                reason = (
                    f"memory.layer: its heads differ from those of layer {self.beside(depth) + 1} of the side network"
                )
            kinds = {layer.residual.kind for layer in layers} - {"pre", "sandwich", "subln"}
            if reason is None and kinds:
                reason = f"residual {min(kinds)} does not leave the stream a sum; pre, sandwich and subln do"
        if reason:
            raise TorchstoneError(f"stack longmem: {reason}")
        at = self.layer(depth) - 1
        return tuple(LayerPlan(layer, Gives(fresh=i == at)) for i, layer in enumerate(layers))

    def source(self, layers: Sequence[LayerSpec], side: int) -> LayerSpec:
        """The backbone layer whose parts and first values a side layer has: the last one beside it."""
        return layers[self.reduction * (side + 1) - 1]

    def build(self, layers: Sequence[LayerSpec], site: Site, context: int, memory_width: int | None) -> Stack:
        assert memory_width is None, "an encoder is refused by `plan`"
        return LongMemStack(self, self.plan(layers, site.width, site.causal), site, context)


class LongMemStack(Stack):
    """The backbone's `layers`, the side network's `side`, one final norm."""

    def __init__(self, spec: LongMemStackSpec, plans: Sequence[LayerPlan], site: Site, context: int) -> None:
        super().__init__(plans, site, context, None)
        self.spec, layers = spec, [plan.spec for plan in plans]
        side: list[Block] = []
        for number in range(len(plans) // spec.reduction):
            own = spec.source(layers, number)
            if number == spec.beside(len(plans)):
                fields = {name: getattr(own.attention, name) for name in SoftmaxSpec.model_fields}
                chunks = spec.memory.retrieve // spec.memory.chunk
                own = own.model_copy(update={"attention": JointSpec(**fields, chunks=chunks)})
            side.append(own.block.build(own, replace(self.site(LayerPlan(own), site), layer=number), None))
        self.side = nn.ModuleList(side)

    def carry(self, rows: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Bank:
        """An empty memory of the sizes that this stack needs.

        Raises:
            TorchstoneError: its index needs FAISS, which is not installed.
        """
        remembered: Any = self.layers[self.spec.layer(len(self.layers)) - 1].get_submodule("attention")
        memory = self.spec.memory
        return Bank(
            rows,
            remembered.G,
            remembered.K,
            tokens=memory.tokens,
            chunk=memory.chunk,
            dtype=dtype,
            device=device,
            index=memory.index,
        )

    def state_spec(self) -> dict[str, tuple[Slot, ...]]:
        side = {
            f"side.{i}.{name}": slots
            for i, layer in enumerate(self.side)
            for name, slots in layer.state_spec().items()  # type: ignore[operator]
        }
        return {**super().state_spec(), **side}

    def prepare(self, ctx: Context) -> None:
        super().prepare(ctx)
        for layer in self.side:
            layer.prepare(ctx)  # type: ignore[operator]

    def forward(
        self, x_BTD: torch.Tensor, ctx: Context, parts: Mapping[str, PartState] | None = None, last: bool = False
    ) -> tuple[torch.Tensor, Aux]:
        aux: Aux = {}
        backbone, r, given = replace(ctx, key=None), self.spec.reduction, None
        before_BTD = h_BTD = x_BTD
        for i, layer in enumerate(self.layers):
            inside = backbone.inside(f"layers.{i}")
            h_BTD, handoff, _ = self.run(layer, h_BTD, inside, self.layer_state(parts, i), None)
            h_BTD = inside.tap("x", h_BTD)
            given = given if handoff is None else handoff
            if (i + 1) % r == 0:
                number = i // r
                inside = ctx.inside(f"side.{number}")
                y_BTD, _, more = self.run(self.side[number], x_BTD, inside, self._side_state(parts, number), None)
                x_BTD = inside.tap("x", y_BTD + (h_BTD - before_BTD))
                before_BTD, aux = h_BTD, add_aux(aux, more)
        if ctx.bank is not None:
            self._hold(ctx, given)
        return self.finish(x_BTD, ctx, last), aux

    def _side_state(self, parts: Mapping[str, PartState] | None, number: int) -> dict[str, PartState] | None:
        if parts is None:
            return None
        lead = f"side.{number}."
        return {path[len(lead) :]: part for path, part in parts.items() if path.startswith(lead)}

    @staticmethod
    def _hold(ctx: Context, given: Handoff | None) -> None:
        """Offer this forward's tokens to the bank: only now, so that none finds itself."""
        assert ctx.bank is not None and given is not None and given.fresh is not None
        ctx.bank.hold(*given.fresh, ctx.q.valid)
