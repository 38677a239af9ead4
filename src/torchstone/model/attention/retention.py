"""Retention (Sun et al. 2023, arXiv 2307.08621, eqs. 5 to 8): scores that decay with distance, and no softmax.

The same layer has three equal forms: one product over all pairs, products within chunks and a sum between them, and a
sum of fixed size that takes one token at a time. Each head has a decay of its own; each head's result is normalised by
its root mean square, so that its scale does not matter, and gated.

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

__all__ = ["Retention", "RetentionSpec"]


class RetentionSpec(AttentionSpec):
    """Multi-scale retention: decayed sums of keys times values, in parallel, in chunks, or one token at a time."""

    consumes: ClassVar[frozenset[str]] = frozenset({"rotation"})
    masks: ClassVar[frozenset[str]] = frozenset({"causal"})
    causal_only: ClassVar[bool] = True
    paper: ClassVar[str] = "Sun et al. 2023, arXiv 2307.08621"

    value_expansion: float = Field(2.0, gt=0)
    """Width of all values together, as a multiple of the stream's."""
    form: Form = "auto"
    """Which of the equal forms runs; auto goes by the number of tokens."""
    chunk: int = Field(64, ge=1)
    """Tokens in a chunk."""
    eps: float = Field(1e-6, gt=0)
    """Added to the mean square of a head."""

    def values(self, width: int) -> int:
        """E."""
        return round(self.value_expansion * width)

    def illegal(self, layer: LayerSpec, width: int) -> str | None:
        if width % self.heads:
            return f"attention.heads: {self.heads} heads do not divide width {width}"
        if self.values(width) % self.heads or not self.values(width):
            return f"attention.value_expansion: {self.heads} heads do not divide a width of {self.values(width)}"
        return super().illegal(layer, width) or layer.position.illegal(self.head_size(width))

    def build(self, site: Site) -> Attention:
        return Retention(self, site)


class Retention(Attention):
    """Decode state: one sum (K, V) a head, whatever the length."""

    def __init__(self, spec: RetentionSpec, site: Site) -> None:
        super().__init__()
        self.spec, self.H = spec, spec.heads
        self.D, self.E = site.width, spec.values(site.width)
        self.K, self.V = self.D // self.H, self.E // self.H
        self.position = site.position(self.K, self.H)
        self.qkvg = site.linear(self.D, (self.D, self.D, self.E, self.E), ("q", "k", "v", "gate"))
        self.inner_norm = site.inner_norm(self.E)
        self.out = site.linear(self.E, self.D, "out")

    def state_spec(self) -> tuple[Slot, ...]:
        return (Slot("s", "recurrent", (self.H, self.K, self.V), dtype=torch.float32, head_axis=0),)

    def prepare(self, ctx: Context) -> None:
        if self.position is not None:
            ctx.rotation(self.position)
        fresh(ctx)

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
        y_BHTV = decayed(self.spec, q, k, v, self.log_decay(x_BTD)[None, :, None], ctx, state)
        # divided by sqrt(sum of decays), as published: the norm takes it out again, and numbers stay small before it
        y_BHTV = y_BHTV / self._sum_of_decays(ctx, x_BTD).sqrt()[..., None].to(y_BHTV.dtype)
        y_BHTV = F.rms_norm(y_BHTV, (self.V,), eps=self.spec.eps)
        y_BTE = ctx.tap("mixed", self.inner_norm(F.silu(gate_BTE) * y_BHTV.transpose(1, 2).flatten(-2)))
        return ctx.tap("out", self.out(y_BTE)), None, {}

    def log_decay(self, x: torch.Tensor) -> torch.Tensor:
        """(H,): log of ``1 - 2^(-5 - h)``, in at least float32."""
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        return torch.log1p(-(2.0 ** (-5.0 - torch.arange(self.H, device=x.device, dtype=dtype))))

    def _sum_of_decays(self, ctx: Context, x: torch.Tensor) -> torch.Tensor:
        """(B|1, H, T): ``(1 - decay^n) / (1 - decay)``, n tokens of the document up to this one."""
        log_decay_H1 = self.log_decay(x)[:, None]
        n_B1T = ctx.q.where[:, None].clamp(min=0) + 1
        return torch.expm1(log_decay_H1 * n_B1T) / torch.expm1(log_decay_H1)

    def flops(self, context: int) -> float:
        per_pair, per_state = 2.0 * self.H * (self.K + self.V), 4.0 * self.H * self.K * self.V
        if context <= self.spec.chunk or self.spec.form == "parallel":
            return per_pair * context
        return per_pair * self.spec.chunk + per_state


def fresh(ctx: Context) -> torch.Tensor | None:
    """(B|1, T): True where a document begins, hence a running sum starts anew; None where nothing does."""

    def make() -> torch.Tensor | None:
        if ctx.q.start is None:
            return None
        begins = ctx.q.start == ctx.q.index
        return begins if ctx.q.valid is None else begins & ctx.q.valid

    return ctx.once("fresh", make)


def decayed(
    spec: RetentionSpec,
    q_BHTK: torch.Tensor,
    k_BHTK: torch.Tensor,
    v_BHTV: torch.Tensor,
    log_decay_BHT: torch.Tensor,
    ctx: Context,
    state: PartState | None,
) -> torch.Tensor:
    """Decayed sums (B, H, T, V). Padding adds nothing and lets nothing decay; a decode state is read and replaced."""
    valid = ctx.q.valid
    if valid is not None:
        k_BHTK = torch.where(valid[:, None, :, None], k_BHTK, 0.0)
        log_decay_BHT = torch.where(valid[:, None], log_decay_BHT, 0.0)
    before = state.tensors["s"] if isinstance(state, Recurrent) else None
    y_BHTV, after = retention(
        q_BHTK, k_BHTK, v_BHTV, log_decay_BHT, fresh(ctx), before, form=spec.form, chunk=spec.chunk
    )
    if isinstance(state, Recurrent):
        state.set(s=after)
    return y_BHTV
