"""What retention and gated retention share: queries times a decayed sum of keys times values, normalised and gated.

Kinds differ in where a head's decay comes from, and in the numbers that it is divided by before its norm.

Shapes: B rows, T tokens, D width, E width of all values, H heads, K channels of a query, V of a value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field

from torchstone.model.attention import Attention, AttentionSpec
from torchstone.model.context import Aux, Context, Handoff
from torchstone.model.site import Site
from torchstone.model.state import PartState, Recurrent, Slot
from torchstone.ops.retention import Form, retention

if TYPE_CHECKING:
    from torchstone.model.stack import LayerSpec

__all__ = ["Decayed", "DecayedSpec"]


class DecayedSpec(AttentionSpec):
    """Decayed sums of keys times values."""

    consumes: ClassVar[frozenset[str]] = frozenset({"rotation"})
    masks: ClassVar[frozenset[str]] = frozenset({"causal"})
    causal_only: ClassVar[bool] = True

    form: Form = "auto"
    """Which of the equal forms runs; auto goes by the number of tokens."""
    chunk: int = Field(64, ge=1)
    """Tokens in a chunk."""
    eps: float = Field(1e-6, gt=0)
    """Added to the mean square of a head."""

    @property
    def grows(self) -> bool:
        return False

    def values(self, width: int) -> int:
        """E."""
        return width

    def illegal(self, layer: LayerSpec, width: int) -> str | None:
        if width % self.heads:
            return f"attention.heads: {self.heads} heads do not divide width {width}"
        return super().illegal(layer, width) or layer.position.illegal(self.head_size(width))


class Decayed(Attention):
    """Decode state: one sum (K, V) a head, whatever the length."""

    def __init__(self, spec: DecayedSpec, site: Site) -> None:
        super().__init__()
        self.spec, self.H = spec, spec.heads
        self.D, self.E = site.width, spec.values(site.width)
        self.K, self.V = self.D // self.H, self.E // self.H
        self.position = site.position(self.K, self.H)
        self.qkvg = site.linear(self.D, (self.D, self.D, self.E, self.E), ("q", "k", "v", "gate"))
        self.inner_norm = site.inner_norm(self.E)
        self.out = site.linear(self.E, self.D, "out")

    def log_decay(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        """(B|1, H, T|1): logarithm of what the sum is multiplied by before a token enters, in at least float32."""
        raise NotImplementedError

    def levelled(self, y_BHTV: torch.Tensor, ctx: Context) -> torch.Tensor:
        """Sums divided by what keeps their numbers small; the norm of a head takes any such factor out again."""
        return y_BHTV

    def state_spec(self) -> tuple[Slot, ...]:
        return (Slot("s", "recurrent", (self.H, self.K, self.V), dtype=torch.float32, head_axis=0),)

    def prepare(self, ctx: Context) -> None:
        if self.position is not None:
            ctx.rotation(self.position)
        _fresh(ctx)

    def forward(
        self,
        x_BTD: torch.Tensor,
        ctx: Context | None = None,
        state: PartState | None = None,
        given: Handoff | None = None,
    ) -> tuple[torch.Tensor, Handoff | None, Aux]:
        ctx = Context.alone(x_BTD) if ctx is None else ctx
        q, k, v, gate_BTE = self.qkvg(x_BTD).split((self.D, self.D, self.E, self.E), -1)
        q, k, v = (x.unflatten(-1, (self.H, -1)).transpose(1, 2) for x in (q, k * self.K**-0.5, v))
        q, k, v = ctx.tap("q", q), ctx.tap("k", k), ctx.tap("v", v)
        rotation = None if self.position is None else ctx.rotation(self.position)
        if rotation is not None:
            q, k = rotation.q(q), rotation.k(k)
        y_BHTV = self.levelled(self._sums(q, k, v, self.log_decay(x_BTD, ctx), ctx, state), ctx)
        y_BHTV = F.rms_norm(y_BHTV, (self.V,), eps=self.spec.eps)
        y_BTE = ctx.tap("mixed", self.inner_norm(F.silu(gate_BTE) * y_BHTV.transpose(1, 2).flatten(-2)))
        return ctx.tap("out", self.out(y_BTE)), None, {}

    def _sums(
        self,
        q_BHTK: torch.Tensor,
        k_BHTK: torch.Tensor,
        v_BHTV: torch.Tensor,
        log_decay_BHT: torch.Tensor,
        ctx: Context,
        state: PartState | None,
    ) -> torch.Tensor:
        """(B, H, T, V). Padding adds nothing and lets nothing decay; a decode state is read and replaced."""
        valid = ctx.q.valid
        if valid is not None:
            k_BHTK = torch.where(valid[:, None, :, None], k_BHTK, 0.0)
            log_decay_BHT = torch.where(valid[:, None], log_decay_BHT, 0.0)
        before = state.tensors["s"] if isinstance(state, Recurrent) else None
        y_BHTV, after = retention(
            q_BHTK, k_BHTK, v_BHTV, log_decay_BHT, _fresh(ctx), before, form=self.spec.form, chunk=self.spec.chunk
        )
        if isinstance(state, Recurrent):
            state.set(s=after)
        return y_BHTV

    def flops(self, context: int) -> float:
        per_pair, per_state = 2.0 * self.H * (self.K + self.V), 4.0 * self.H * self.K * self.V
        if context <= self.spec.chunk or self.spec.form == "parallel":
            return per_pair * context
        return per_pair * self.spec.chunk + per_state


def _fresh(ctx: Context) -> torch.Tensor | None:
    """(B|1, T): True where a document begins, hence a running sum starts anew; None where nothing does."""

    def make() -> torch.Tensor | None:
        if ctx.q.start is None:
            return None
        begins = ctx.q.start == ctx.q.index
        return begins if ctx.q.valid is None else begins & ctx.q.valid

    return ctx.once("fresh", make)
