"""Dilated attention (Ding et al. 2023, arXiv 2307.02486, section 2.2): LongNet's mixture of sparse patterns.

Pattern i cuts a document into segments of ``w_i`` tokens and lets head j keep every ``r_i``-th token of each from the
offset ``s_j`` on. Softmax attention runs among the kept tokens; the patterns are mixed by their denominators,
``O = sum_i alpha_i O_i`` with ``alpha_i = exp(LSE_i) / sum_j exp(LSE_j)``. A key that two patterns keep counts twice,
as in the paper. With w and r growing geometrically the cost is linear in the length, and any two tokens are joined by a
path of logarithmic length.

Segments are counted from the beginning of each document, so packed documents equal separate ones. Padding is never
kept.

Shapes: B rows, T queries, S keys, D width, H heads, G key/value heads, K head dimension, Z items of one head, c queries
and W keys of an item.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field

from torchstone.errors import TorchstoneError
from torchstone.model.attention import Attention
from torchstone.model.attention._heads import Heads, HeadsSpec
from torchstone.model.context import Aux, Context, Handoff
from torchstone.model.site import Site
from torchstone.model.state import Growing, PartState, Slot
from torchstone.model.tokens import Tokens
from torchstone.ops.dilated import Bias, Marks, Pattern, Plan, Shards, dilated, plan

if TYPE_CHECKING:
    from torchstone.model.stack import LayerSpec

__all__ = ["DilatedAttention", "DilatedSpec"]


class DilatedSpec(HeadsSpec):
    """Softmax attention on dilated segments, several patterns mixed by their softmax denominators."""

    masks: ClassVar[frozenset[str]] = frozenset({"causal"})
    paper: ClassVar[str] = "Ding et al. 2023, arXiv 2307.02486"

    segments: tuple[Annotated[int, Field(ge=1)], ...] = (2048, 4096, 8192, 16384, 32768)
    """Segment length of each pattern, not decreasing; one beyond the sequence is the sequence."""
    dilations: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 4, 6, 12)
    """Dilation rate of each pattern: 1 first, not decreasing, at most the segment."""
    offset: Literal["mod", "block"] = "mod"
    """How heads share out the offsets 0..r-1: head j takes j mod r, or r blocks of heads in order take one each."""
    mix_gradient: bool = False
    """Whether gradients flow through the shares of the patterns; the published code has them constant."""

    def illegal(self, layer: LayerSpec, width: int) -> str | None:
        return self._irregular() or super().illegal(layer, width)

    def _irregular(self) -> str | None:
        """What is wrong with the patterns."""
        w, r = self.segments, self.dilations
        if not w or len(w) != len(r):
            return (
                f"attention.dilations: {len(r)} dilations for {len(w)} segments; each pattern needs one of both, and "
                "there must be one at least"
            )
        if r[0] != 1:
            return f"attention.dilations: the first is {r[0]}, and must be 1 for every token to be kept by some pattern"
        for name, values in (("segments", w), ("dilations", r)):
            if list(values) != sorted(values):
                return f"attention.{name}: {list(values)} decreases; none may be less than the one before it"
        if bad := next((pair for pair in zip(w, r, strict=True) if pair[1] > pair[0]), None):
            return f"attention.dilations: {bad[1]} is more than its segment of {bad[0]} tokens"
        return None

    def patterns(self) -> tuple[Pattern, ...]:
        """Patterns with the offset of every head."""

        def offset(head: int, rate: int) -> int:
            return head % rate if self.offset == "mod" else head // -(-self.heads // rate)

        return tuple(
            Pattern(w, r, tuple(offset(head, r) for head in range(self.heads)))
            for w, r in zip(self.segments, self.dilations, strict=True)
        )

    def build(self, site: Site) -> Attention:
        return DilatedAttention(self, site)


class DilatedAttention(Heads):
    """Decode state: a growing cache of all keys and values, of which a step reads what its segments keep.

    Attributes:
        shards: set where the rows are sharded over ranks; each rank's tokens then have their index in the whole row.
    """

    spec: DilatedSpec

    def __init__(self, spec: DilatedSpec, site: Site) -> None:
        super().__init__(spec, site)
        self.patterns = spec.patterns()
        self.position = site.position(self.K, self.H)
        self.biased = site.position_spec is not None and site.position_spec.gives == "bias"
        self.qkv = self.fused(site)
        self.name = f"dilated.{self.patterns}.{self.biased}"  # layers of the same patterns share a plan
        self.shards: Shards | None = None

    def state_spec(self) -> tuple[Slot, ...]:
        return tuple(Slot(name, "growing", (self.G, self.K), head_axis=0) for name in ("k", "v"))

    def prepare(self, ctx: Context) -> None:
        if self.position is not None:
            ctx.rotation(self.position)
        self._plan(ctx)

    def _plan(self, ctx: Context) -> Plan:
        return ctx.once(self.name, lambda: self._planned(ctx))

    def _planned(self, ctx: Context) -> Plan:
        causal, scored = ctx.mask.causal, self.biased or ctx.k.offset is not None
        plain = ctx.relation == "same" and ctx.q.start is None and ctx.q.valid is None
        q = _marks(ctx.q, ctx.slots is not None)
        if self.shards is not None:
            if not plain or scored or ctx.slots is not None:
                raise TorchstoneError(
                    "attention dilated: a sequence sharded over ranks can have no packed documents, padding, score "
                    "bias or decode state"
                )
            return self.shards.plan(q, self.patterns, causal=causal)
        k = q if ctx.k is ctx.q else _marks(ctx.k, ctx.slots is not None)
        return plan(q, k, self.patterns, causal=causal, own_BT=ctx.slots, aligned=plain, flags=not scored)

    def _bias(self, ctx: Context) -> Bias | None:
        """Score bias of items, from the tokens that they keep."""
        if not self.biased and ctx.k.offset is None:
            return None

        def bias(row_Z: torch.Tensor, head_Z: torch.Tensor, q_Zc: torch.Tensor, k_ZW: torch.Tensor) -> torch.Tensor:
            q, k = ctx.q.take(row_Z, q_Zc), ctx.k.take(row_Z, k_ZW)
            total = None if k.offset is None else k.offset[:, None].to(torch.get_default_dtype())
            if self.biased and self.position is not None:
                every_ZHcW = ctx.positions[self.position].bias(q, k)
                own_ZcW = every_ZHcW[torch.arange(len(head_Z), device=head_Z.device), head_Z]
                total = own_ZcW if total is None else own_ZcW + total
            assert total is not None
            return total

        return bias

    def forward(
        self,
        x_BTD: torch.Tensor,
        ctx: Context | None = None,
        state: PartState | None = None,
        given: Handoff | None = None,
    ) -> tuple[torch.Tensor, Handoff | None, Aux]:
        ctx = Context.alone(x_BTD, self.causal) if ctx is None else ctx
        q, k, v = self.projected(x_BTD, ctx)
        rotation = None if self.position is None else ctx.rotation(self.position)
        if rotation is not None:
            q, k = rotation.q(q), rotation.k(k)
        if isinstance(state, Growing):
            assert ctx.slots is not None
            k, v = state.write(ctx.slots, ctx.k.index.shape[1], k=k.transpose(1, 2), v=v.transpose(1, 2))
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        y_BHTK = dilated(
            q.to(k.dtype),
            k,
            v,
            self._plan(ctx),
            scale=self.scale,
            mix_gradient=self.spec.mix_gradient,
            bias=self._bias(ctx),
        )
        return self.joined(y_BHTK, ctx), None, {}

    def flops(self, context: int) -> float:
        """The mean over queries: a head attends with one in r tokens, to every r-th of its segment, or, when causal, to
        those up to itself."""
        keys = 0.0
        for pattern in self.patterns:
            r = pattern.dilation
            if self.causal:  # `context` keys are the mean of a sequence of 2 context - 1 tokens
                keys += (min(pattern.length, 2 * context - 1) + r) / (2 * r * r)
            else:
                keys += min(pattern.length, context) / (r * r)
        return 4.0 * self.H * self.K * keys


def _marks(tokens: Tokens, stored: bool) -> Marks:
    """Segments go by the place in the document. Padding on the left has none; a state is padded on the right alone."""
    document = torch.zeros_like(tokens.index) if tokens.start is None else tokens.start
    place = tokens.index - document
    if tokens.valid is not None and tokens.start is None and not stored:
        place = (tokens.valid.long().cumsum(1) - 1).clamp(min=0)
    return Marks(tokens.index, document, place, tokens.valid)
