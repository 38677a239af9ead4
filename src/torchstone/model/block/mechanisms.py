"""Independent mechanisms that compete and communicate (Lamb et al. 2021, arXiv 2103.00336).

The stream is cut into M slices of D / M channels, and each has a sequential layer of that width to itself: attention,
feed-forward, norms, and where there is a memory a cross-attention to its own slice of that. Side by side these are
layers whose matrices are block-diagonal and whose norms are by slice. Mechanisms meet in two places:

    c = softmax over mechanisms of (w_m . h_m + b_m)      x_m <- write(x_m, c_m attention_m(h_m)),  h_m = read(x_m)
    x_m <- write(x_m, W_m [sum over l of softmax_l(q_m . k_l / sqrt(K)) v_l, by head])

The first is the competition: it shares out by how much each mechanism may change from attention, and nothing else. The
second is the communication: attention across mechanisms at one position, after the feed-forward or before it, so it
has no decode state. How streams are read and written, and so where the norms are, is the layer's residual.

Shapes: B rows, T tokens, D width, M mechanisms, W = D / M; of the communication H heads of K channels, N = B * T.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field
from torch import nn

from torchstone import ops
from torchstone.model.attention.softmax import mix_values
from torchstone.model.block import Block, BlockSpec
from torchstone.model.block.sequential import SequentialBlock, SequentialSpec
from torchstone.model.context import Aux, Context, Handoff, add_aux
from torchstone.model.mask import Lowered
from torchstone.model.site import Site
from torchstone.model.state import PartState
from torchstone.spec import Spec

if TYPE_CHECKING:
    from torchstone.model.attention import AttentionSpec
    from torchstone.model.feedforward import FeedForwardSpec
    from torchstone.model.stack import LayerSpec

__all__ = ["Communication", "CommunicationSpec", "Competition", "MechanismsBlock", "MechanismsSpec"]

_Mixer = TypeVar("_Mixer", "AttentionSpec", "FeedForwardSpec")


class CommunicationSpec(Spec):
    """Attention across mechanisms at one position."""

    heads: int = Field(2, ge=1)
    """Number of heads."""
    head_dim: int | None = Field(None, ge=1)
    """Dimension of a head; None means 32, or the width of a mechanism where that is less."""
    place: Literal["after_ffn", "before_ffn"] = "after_ffn"
    """Whether it stands after the feed-forward or before it."""

    def head_size(self, width: int) -> int:
        """Dimension of a head, for mechanisms of this width."""
        return self.head_dim or min(32, width)


class MechanismsSpec(BlockSpec):
    """Sequential layers side by side, each on a slice of the stream, that compete and communicate."""

    offered: ClassVar[bool] = False
    paper: ClassVar[str] = "Lamb et al. 2021, arXiv 2103.00336"

    mechanisms: int = Field(2, ge=1)
    """M, a divisor of the width and of the heads."""
    competition: Literal["softmax", "scaled", "none"] = "softmax"
    """What a mechanism's update from attention is multiplied by: its share, its share times M, or nothing."""
    communication: CommunicationSpec | None = CommunicationSpec()
    """Attention across mechanisms; None leaves it out."""

    def misplaced(self) -> str | None:
        return "block mechanisms: only stack tim places it"

    def illegal(self, layer: LayerSpec, width: int) -> str | None:
        M = self.mechanisms
        counts = {"width": width}
        for part in (layer.attention, layer.ffn):
            counts |= {f"{part.family}.{name}": getattr(part, name) for name in part.divided}
        for name, count in counts.items():
            if count is not None and count % M:
                return f"stack.mechanisms: {M} mechanisms do not divide {name}, which is {count}"
        why = self.one(layer).illegal(width // M)
        return f"stack.mechanisms: in each of {M} mechanisms, {why}" if why else None

    def one(self, layer: LayerSpec) -> LayerSpec:
        """The parts of one mechanism: the layer's own, with their heads and hidden units shared out."""

        def share(part: _Mixer) -> _Mixer:
            counts = {name: getattr(part, name) for name in part.divided}
            return part.model_copy(
                update={name: count // self.mechanisms for name, count in counts.items() if count is not None}
            )

        return layer.model_copy(
            update={"attention": share(layer.attention), "ffn": share(layer.ffn), "block": SequentialSpec()}
        )

    def build(self, layer: LayerSpec, site: Site, memory_width: int | None) -> Block:
        return MechanismsBlock(self, layer, site, memory_width)


class MechanismsBlock(Block):
    """(B, T, D) -> (B, T, D). Decode state: that of each mechanism's attentions."""

    def __init__(self, spec: MechanismsSpec, layer: LayerSpec, site: Site, memory_width: int | None) -> None:
        super().__init__()
        M, one = spec.mechanisms, spec.one(layer)
        sites = [replace(site, width=site.width // M, group=m) for m in range(M)]
        memory = None if memory_width is None else memory_width // M
        self.spec, self.crosses = spec, memory is not None
        self.mechanisms = nn.ModuleList(SequentialBlock(one, at, memory) for at in sites)
        names = SequentialBlock.attentions if memory is None else ("attention", "cross")
        self.attentions = tuple(f"mechanisms.{m}.{name}" for m in range(M) for name in names)
        self.competition = None if spec.competition == "none" else Competition(M, site.width // M)
        self.communication = None
        if spec.communication is not None:
            self.communication = Communication(spec.communication, layer, sites)

    def forward(
        self,
        x_BTD: torch.Tensor,
        ctx: Context,
        state: Mapping[str, PartState] | None = None,
        given: Handoff | None = None,
    ) -> tuple[torch.Tensor, Handoff | None, Aux]:
        aux: Aux = {}
        state, M = state or {}, self.spec.mechanisms
        mechanisms: list[Any] = list(self.mechanisms)
        contexts = [self._inside(ctx, m) for m in range(M)]
        x_BTW = list(x_BTD.chunk(M, -1))
        h_BTW = [one.attention_residual.read(x) for one, x in zip(mechanisms, x_BTW, strict=True)]
        share_BTM = None
        if self.competition is not None:
            share_BTM = ctx.tap("competition", self.competition(h_BTW))
            share_BTM = share_BTM * M if self.spec.competition == "scaled" else share_BTM
        for m, one in enumerate(mechanisms):
            inside, path = contexts[m].inside("attention"), f"mechanisms.{m}"
            y, _, more = one.attention(h_BTW[m], inside, state.get(f"{path}.attention"))
            y = y if share_BTM is None else share_BTM[..., m : m + 1].to(y.dtype) * y
            x_BTW[m], aux = one.attention_residual.write(x_BTW[m], y, inside), add_aux(aux, more)
            if self.crosses:
                x_BTW[m], more = one.crossed(x_BTW[m], contexts[m], state.get(f"{path}.cross"))
                aux = add_aux(aux, more)
        place = None if self.spec.communication is None else self.spec.communication.place
        if self.communication is not None and place == "before_ffn":
            x_BTW = self.communication(x_BTW, ctx.inside("communication"))
        for m, one in enumerate(mechanisms):
            x_BTW[m], more = one.fed(x_BTW[m], contexts[m])
            aux = add_aux(aux, more)
        if self.communication is not None and place == "after_ffn":
            x_BTW = self.communication(x_BTW, ctx.inside("communication"))
        return torch.cat(x_BTW, -1), None, aux

    def _inside(self, ctx: Context, m: int) -> Context:
        """The context of mechanism m, with its slice of the memory."""
        ctx = ctx.inside(f"mechanisms.{m}")
        if self.crosses and ctx.memory is not None and ctx.memory.x is not None:
            mine = ctx.memory.x.chunk(self.spec.mechanisms, -1)[m]
            return replace(ctx, memory=replace(ctx.memory, x=mine))
        return ctx


class Competition(nn.Module):
    """Shares (B, T, M) that add up to 1 from M vectors (B, T, W): one logit each, in at least float32."""

    def __init__(self, mechanisms: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(mechanisms, width))
        self.bias = nn.Parameter(torch.empty(mechanisms))

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        parameter.uniform_(-0.05, 0.05, generator=generator)  # shares start nearly equal, as in the public code

    def forward(self, h_BTW: list[torch.Tensor]) -> torch.Tensor:
        h_BTMW = torch.stack(h_BTW, -2)
        logits_BTM = torch.einsum("btmw,mw->btm", h_BTMW, self.weight.to(h_BTMW.dtype)) + self.bias
        return ops.at_least_float32(logits_BTM).softmax(-1)


class Communication(nn.Module):
    """M streams (B, T, W) -> the same after attention across them. Every projection is a mechanism's own."""

    def __init__(self, spec: CommunicationSpec, layer: LayerSpec, sites: list[Site]) -> None:
        super().__init__()
        W = sites[0].width
        self.H, self.K = spec.heads, spec.head_size(W)
        E = self.H * self.K
        self.residual = nn.ModuleList(layer.residual.build(site) for site in sites)
        self.qkv = nn.ModuleList(site.linear(W, (E, E, E), ("q", "k", "v")) for site in sites)
        self.inner_norm = nn.ModuleList(site.inner_norm(E) for site in sites)
        self.out = nn.ModuleList(site.linear(E, W, "out") for site in sites)

    def forward(self, x_BTW: list[torch.Tensor], ctx: Context) -> list[torch.Tensor]:
        residuals: list[Any] = list(self.residual)
        made = [qkv(residual.read(x)) for residual, qkv, x in zip(residuals, self.qkv, x_BTW, strict=True)]
        heads_NHMK = torch.stack(made, -2).flatten(0, 1).unflatten(-1, (3 * self.H, self.K)).transpose(1, 2)
        q, k, v = heads_NHMK.chunk(3, 1)  # every position is a row, every mechanism a place in it
        # kept, and so no kernel: M is too small for one, and on CUDA they take 65,535 rows at most (pytorch #146704)
        y_NHMK = mix_values(q, k, v, Lowered(), ctx, scale=self.K**-0.5, keep=True)[0]
        y_BTME = y_NHMK.transpose(1, 2).flatten(-2).unflatten(0, x_BTW[0].shape[:2])
        return [
            residual.write(x, out(norm(y_BTME[..., m, :])), ctx.inside(str(m)))
            for m, (residual, x, out, norm) in enumerate(zip(residuals, x_BTW, self.out, self.inner_norm, strict=True))
        ]

    def flops(self, context: int) -> float:
        """Multiply-adds times two per token besides the products with weights; the context plays no part."""
        return 4.0 * self.H * self.K * len(self.qkv) ** 2
