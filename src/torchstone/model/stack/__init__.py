"""Stack: the layers of an encoder or a decoder, and what they share.

    x_BTD, aux = stack(x_BTD, ctx, parts, last)

Shapes: B rows, T tokens, D width, E width of the embedding's vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchstone.errors import TorchstoneError
from torchstone.model.attention import AttentionSpec
from torchstone.model.block import Block, BlockSpec
from torchstone.model.carry import Carry
from torchstone.model.context import Aux, Context, Handoff, add_aux, aux_of
from torchstone.model.feedforward import FeedForwardSpec
from torchstone.model.linear import LinearSpec
from torchstone.model.norm import NormSpec
from torchstone.model.position import Positions, PositionSpec
from torchstone.model.residual import ResidualSpec
from torchstone.model.site import Gives, Site
from torchstone.model.state import PartState, Slot
from torchstone.model.tokens import pick
from torchstone.spec import Part, PartSpec, Spec, lazy_parts, part

__all__ = ["LayerPlan", "LayerSpec", "Stack", "StackSpec"]

__getattr__ = lazy_parts(__name__)


class LayerSpec(Spec):
    """The parts of one layer."""

    attention: Part[AttentionSpec] = part("softmax", "attention")
    """How positions are mixed."""
    position: Part[PositionSpec] = part("rotary", "position")
    """How order enters."""
    ffn: Part[FeedForwardSpec] = part("swiglu", "ffn")
    """How channels are mixed."""
    residual: Part[ResidualSpec] = part("pre", "residual")
    """How sublayers are joined to the stream."""
    norm: Part[NormSpec] = part("rmsnorm", "norm")
    """The kind of norm everywhere in the layer."""
    linear: Part[LinearSpec] = part("dense", "linear")
    """The kind of projection everywhere in the layer."""
    block: Part[BlockSpec] = part("sequential", "block")
    """Order of the sublayers."""

    def illegal(self, width: int) -> str | None:
        """Why these parts do not go together at this width, in one sentence; None if they do."""
        return self.attention.illegal(self, width) or self.ffn.illegal(self, width) or self.block.illegal(self, width)


@dataclass(frozen=True)
class LayerPlan:
    """A layer as a stack plans it: its parts and what it hands to later ones."""

    spec: LayerSpec
    gives: Gives = Gives()


class StackSpec(PartSpec):
    """What the layers of an encoder or a decoder share."""

    family: ClassVar[str] = "stack"
    default_kind: ClassVar[str] = "plain"

    def plan(self, layers: Sequence[LayerSpec], width: int, causal: bool) -> tuple[LayerPlan, ...]:
        """Who gets which kind and who gives what. A layer that gives passes its handoff to all later ones, up to the
        next that gives; kinds that take one are placed here and nowhere else.

        Raises:
            TorchstoneError: the stack's rules forbid these layers.
        """
        return tuple(LayerPlan(layer) for layer in layers)

    def build(self, layers: Sequence[LayerSpec], site: Site, context: int, memory_width: int | None) -> Stack:
        """The module for these layers."""
        return Stack(self.plan(layers, site.width, site.causal), site, context, memory_width)


class Stack(nn.Module):
    """Layers one after another, position modules, and the final norm that the residual asks for.

    `recompute` drops activations of each layer in training and makes them again in the backward pass.
    """

    def __init__(self, plans: Sequence[LayerPlan], site: Site, context: int, memory_width: int | None) -> None:
        super().__init__()
        self.positions = Positions(context, site.causal)
        layers: list[Block] = []
        for number, plan in enumerate(plans):
            # stochastic depth grows linearly with depth (Huang et al. 2016, section 3)
            drop_path = site.drop_path * number / max(1, len(plans) - 1)
            at = replace(self.site(plan, site), layer=number, drop_path=drop_path)
            layers.append(plan.spec.block.build(plan.spec, at, memory_width))
        self.layers = nn.ModuleList(layers)
        last = plans[-1].spec
        self.norm = last.residual.final_norm(replace(site, norm_spec=last.norm, residual_spec=last.residual))
        self.absolute: str | None = None
        added = plans[0].spec.position.added
        for position in (plan.spec.position for plan in plans):
            if position.added not in (None, added):
                raise TorchstoneError(f"position {position.kind} adds to the input and cannot differ by layer")
        if added is not None:
            wide = site.table_width or site.width
            self.absolute = self.positions.add(added, wide, 1, wide)
        self.recompute = False

    def site(self, plan: LayerPlan, site: Site) -> Site:
        """Where parts of a planned layer are built."""
        spec = plan.spec
        return replace(
            site,
            positions=self.positions,
            gives=plan.gives,
            linear_spec=spec.linear,
            norm_spec=spec.norm,
            position_spec=spec.position,
            residual_spec=spec.residual,
        )

    @property
    def blocks(self) -> list[Block]:
        """The layers."""
        return list(self.layers)  # type: ignore[arg-type]

    @property
    def limit(self) -> int | None:
        """Largest number of positions that all position modules know; None if any."""
        limits = [module.limit for module in self.positions.modules_by_key().values()]
        return min((limit for limit in limits if limit is not None), default=None)

    def added(self, where_BT: torch.Tensor) -> torch.Tensor | None:
        """Position embeddings (B|1, T, E) to add to the embedding's vectors, if the position is of that kind."""
        return None if self.absolute is None else self.positions.modules_by_key()[self.absolute].embed(where_BT)

    def carry(self, rows: int, dtype: torch.dtype, device: torch.device | str) -> Carry | None:
        """What is carried from batch to batch for this many rows of streams, empty; None if nothing is."""
        return None

    def state_spec(self) -> dict[str, tuple[Slot, ...]]:
        """Slots by path within the stack ("layers.3.attention")."""
        return {
            f"layers.{i}.{name}": slots
            for i, layer in enumerate(self.blocks)
            for name, slots in layer.state_spec().items()
        }

    def layer_state(self, parts: Mapping[str, PartState] | None, i: int) -> dict[str, PartState] | None:
        """The decode state of layer i by sublayer."""
        if parts is None:
            return None
        lead = f"layers.{i}."
        return {name: parts[lead + name] for name in self.blocks[i].attentions if lead + name in parts}

    def prepare(self, ctx: Context) -> None:
        """Make masks and rotations before the layers, so that compiled layers all see the same context."""
        for layer in self.blocks:
            layer.prepare(ctx)

    def forward(
        self, x_BTD: torch.Tensor, ctx: Context, parts: Mapping[str, PartState] | None = None, last: bool = False
    ) -> tuple[torch.Tensor, Aux]:
        """Hidden states after the final norm (B, T, D), and the layers' sums added up.

        With `last`, only those of each row's last valid token (B, 1, D); layers that nothing but other positions'
        outputs needs may then be left out for them.
        """
        x_BTD, aux = self.through(range(len(self.layers)), x_BTD, ctx, parts)
        return self.finish(x_BTD, ctx, last), aux

    def finish(self, x_BTD: torch.Tensor, ctx: Context, last: bool) -> torch.Tensor:
        """The final norm of the stream, with `last` of each row's last valid token alone."""
        x_BTD = ctx.tap("norm", self.norm(x_BTD))
        return pick(x_BTD, ctx.q.newest(x_BTD.shape[0])) if last else x_BTD

    def through(
        self,
        numbers: range,
        x_BTD: torch.Tensor,
        ctx: Context,
        parts: Mapping[str, PartState] | None,
        given: Handoff | None = None,
    ) -> tuple[torch.Tensor, Aux]:
        """The stream after the layers of these numbers, and their sums; `given` is handed to the first."""
        aux: Aux = {}
        for i in numbers:
            inside = ctx.inside(f"layers.{i}")
            x_BTD, handoff, more = self.run(self.layers[i], x_BTD, inside, self.layer_state(parts, i), given)
            given = given if handoff is None else handoff
            x_BTD, aux = inside.tap("x", x_BTD), add_aux(aux, more)
        return x_BTD, aux

    def run(
        self,
        layer: nn.Module,
        x_BTD: torch.Tensor,
        ctx: Context,
        state: dict[str, PartState] | None,
        given: Handoff | None,
    ) -> tuple[torch.Tensor, Handoff | None, Aux]:
        """One layer, its activations kept or made again in the backward pass."""
        # a forward that somebody listens to runs uncompiled: each tap's name would be a graph of its own
        call = layer if ctx.taps is None else layer._call_impl
        if self.recompute and state is None and torch.is_grad_enabled():
            # dropout is a function of the context's key, so there is no random state to restore
            x_BTD, handoff, aux = checkpoint(
                call, x_BTD, ctx, None, given, use_reentrant=False, preserve_rng_state=False
            )
        else:
            x_BTD, handoff, aux = call(x_BTD, ctx, state, given)
        return x_BTD, handoff, aux_of(self._path(layer), aux) if aux else aux

    def _path(self, layer: nn.Module) -> str:
        """Where a layer is: "layers.3", or in a list of another name that a stack has."""
        lists = ((name, child) for name, child in self.named_children() if isinstance(child, nn.ModuleList))
        return next(f"{name}.{i}" for name, child in lists for i, module in enumerate(child) if module is layer)
