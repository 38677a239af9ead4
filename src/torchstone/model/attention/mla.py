"""Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434, section 2.1, eqs. 9 to 19).

Keys and values of all heads are projections of one latent a token, and one rotated key is shared by all heads; only
these two are cached:

    c^Q = norm(W^DQ x)       [q^C; q^R] = W^UQ c^Q, per head                      (or [q^C; q^R] = W^Q x)
    c^KV = norm(W^DKV x)     k^C = W^UK c^KV, v = W^UV c^KV, per head             k^R = R W^KR x
    y = softmax(scale (q^C . k^C + R q^R . k^R)) v                                out = W^O [y of all heads]

Since q^C . (W^UK c) = (W^UK^T q^C) . c, one head of keys [c; k^R] and values c serves all query heads: W^UK is absorbed
into the query, W^UV into what comes out. That form reads no more than the cache, and is what decoding uses.

Shapes: B rows, T queries, S keys, D width, H heads; of a head N channels without position, R rotated ones, K = N + R,
V of a value; C of the latent, L = C + R cached.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from torchstone.model.attention import Attention, AttentionSpec
from torchstone.model.attention.softmax import mix_values
from torchstone.model.context import Aux, Context, Handoff
from torchstone.model.linear import Linear
from torchstone.model.mask import Lowered
from torchstone.model.site import Site
from torchstone.model.state import Growing, PartState, Slot

if TYPE_CHECKING:
    from torchstone.model.stack import LayerSpec

__all__ = ["LatentAttention", "MLASpec"]


class MLASpec(AttentionSpec):
    """Multi-head latent attention: keys and values of all heads from one cached latent a token."""

    divided: ClassVar[tuple[str, ...]] = ("heads", "kv_latent", "q_latent")
    masks: ClassVar[frozenset[str]] = frozenset({"causal", "window", "role", "prefix"})
    paper: ClassVar[str] = "DeepSeek-AI 2024, arXiv 2405.04434"

    kv_latent: int = Field(512, ge=1)
    """Width of the latent of keys and values."""
    q_latent: int | None = Field(None, ge=1)
    """Width of the latent of queries; None projects them from the stream."""
    nope_dim: int = Field(128, ge=1)
    """Channels of a head that see no rotation."""
    rope_dim: int = Field(64, ge=0)
    """Channels of a head that are rotated; their key is one for all heads. 0 has none."""
    v_dim: int = Field(128, ge=1)
    """Channels of a value."""
    eps: float = Field(1e-6, gt=0, le=1)
    """eps of the norms of the latents, whatever that of the model's norms."""
    scale: float | None = Field(None, gt=0)
    """Factor on scores; None means 1 / sqrt(nope_dim + rope_dim)."""
    form: Literal["auto", "naive", "absorbed"] = "auto"
    """Which of the equal forms runs; auto is naive without a state, and with one goes by the number of new tokens."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Rate at which probabilities are dropped in training."""

    def head_size(self, width: int) -> int:
        return self.nope_dim + self.rope_dim

    def illegal(self, layer: LayerSpec, width: int) -> str | None:
        if self.form == "absorbed" and not layer.linear.exact:
            return (
                f"attention.form: absorbed needs projections that are linear, and {layer.linear.kind} ones are not; "
                "use auto or naive"
            )
        if layer.position.gives == "rotation" and not self.rope_dim:
            return f"attention.rope_dim: 0 leaves position {layer.position.kind} nothing to rotate; use position none"
        return super().illegal(layer, width) or layer.position.illegal(self.rope_dim)

    def build(self, site: Site) -> Attention:
        return LatentAttention(self, site)


class LatentAttention(Attention):
    """Decode state: a growing cache of each token's latent, after its norm, and rotated key."""

    def __init__(self, spec: MLASpec, site: Site) -> None:
        super().__init__()
        self.spec, self.causal = spec, site.causal
        self.H, self.N, self.R, self.V, self.C = spec.heads, spec.nope_dim, spec.rope_dim, spec.v_dim, spec.kv_latent
        self.K = self.N + self.R
        self.scale = self.K**-0.5 if spec.scale is None else spec.scale
        self.position = site.position(self.R, self.H)
        self.biased = site.position_spec is not None and site.position_spec.gives == "bias"
        # one product of the stream, named for what it gives; c^KV and k^R are one slice, as published
        first = site.linear(site.width, (spec.q_latent or self.H * self.K, self.C + self.R), ("q", "k"))
        self.down = first if spec.q_latent else None
        self.qkv = None if spec.q_latent else first
        latents = replace(site, norm_spec=site.norm_spec.model_copy(update={"eps": spec.eps}))
        self.q_norm = latents.norm(spec.q_latent, before_linear=True) if spec.q_latent else None
        self.q_up = site.linear(spec.q_latent, self.H * self.K, "q") if spec.q_latent else None
        self.kv_norm = latents.norm(self.C, before_linear=True)
        self.kv_up = site.linear(self.C, (self.H * self.N, self.H * self.V), ("k", "v"))
        self.inner_norm = site.inner_norm(self.H * self.V)
        self.out = site.linear(self.H * self.V, site.width, "out")

    def state_spec(self) -> tuple[Slot, ...]:
        # one slot for both, so that the absorbed form's keys are the cache as it lies
        return (Slot("kv", "growing", (self.C + self.R,)),)

    def _lowered(self, ctx: Context) -> Lowered:
        return ctx.lowered(None, self.position if self.biased else None)

    def prepare(self, ctx: Context) -> None:
        if self.position is not None:
            ctx.rotation(self.position)
        self._lowered(ctx)

    def forward(
        self,
        x_BTD: torch.Tensor,
        ctx: Context | None = None,
        state: PartState | None = None,
        given: Handoff | None = None,
    ) -> tuple[torch.Tensor, Handoff | None, Aux]:
        ctx = Context.alone(x_BTD, self.causal) if ctx is None else ctx
        first = self.qkv if self.down is None else self.down
        assert first is not None
        q, kv = first(x_BTD).split((self.spec.q_latent or self.H * self.K, self.C + self.R), -1)
        if self.q_norm is not None and self.q_up is not None:
            q = self.q_up(self.q_norm(q))
        q_BHTK = ctx.tap("q", q.unflatten(-1, (self.H, self.K)).transpose(1, 2))
        latent_BTC, k_BTR = kv.split((self.C, self.R), -1)
        latent_BTC = ctx.tap("latent", self.kv_norm(latent_BTC))
        rotation = None if self.position is None else ctx.rotation(self.position)
        if rotation is not None:
            q_BHTN, q_BHTR = q_BHTK.split((self.N, self.R), -1)
            q_BHTK = torch.cat([q_BHTN, rotation.q(q_BHTR)], -1)
            k_BTR = rotation.k(k_BTR[:, None])[:, 0]
        kv_BSL = torch.cat([latent_BTC, k_BTR.to(latent_BTC.dtype)], -1)
        if isinstance(state, Growing):
            assert ctx.slots is not None
            (kv_BSL,) = state.write(ctx.slots, ctx.k.index.shape[1], kv=kv_BSL)
        form = self._absorbed if self._absorbs(x_BTD.shape[1], state) else self._naive
        y_BHTV = form(q_BHTK.to(kv_BSL.dtype), kv_BSL, ctx)
        y_BTE = ctx.tap("mixed", self.inner_norm(y_BHTV.transpose(1, 2).flatten(-2)))
        return ctx.tap("out", self.out(y_BTE)), None, {}

    def _absorbs(self, T: int, state: PartState | None) -> bool:
        """Whether the absorbed form runs. A projection that somebody has wrapped has no weight to absorb."""
        if not isinstance(self.kv_up, Linear) or not self.kv_up.spec.exact or self.spec.form == "naive":
            return False
        if self.spec.form == "absorbed":
            return True
        # its scores and values are of the latent's width, and it spares keys and values of every cached token: for
        # long caches it multiplies less up to this many new tokens
        return state is not None and T * (2 * self.C - self.N - self.V) < self.C * (self.N + self.V)

    def _mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ctx: Context) -> torch.Tensor:
        return mix_values(q, k, v, self._lowered(ctx), ctx, scale=self.scale, dropout=self.spec.dropout)[0]

    def _naive(self, q_BHTK: torch.Tensor, kv_BSL: torch.Tensor, ctx: Context) -> torch.Tensor:
        """(B, H, T, V), over keys and values of every head."""
        latent_BSC, k_BSR = kv_BSL.split((self.C, self.R), -1)
        k, v = self.kv_up(latent_BSC).split((self.H * self.N, self.H * self.V), -1)
        k_BHSN, v_BHSV = (x.unflatten(-1, (self.H, -1)).transpose(1, 2) for x in (k, v))
        k_BHSR = k_BSR[:, None].expand(-1, self.H, -1, -1).to(k_BHSN.dtype)
        return self._mix(q_BHTK.to(k_BHSN.dtype), torch.cat([k_BHSN, k_BHSR], -1), v_BHSV, ctx)

    def _absorbed(self, q_BHTK: torch.Tensor, kv_BSL: torch.Tensor, ctx: Context) -> torch.Tensor:
        """(B, H, T, V), over the latents themselves."""
        assert isinstance(self.kv_up, Linear)
        w_k, w_v = self.kv_up.merged().to(q_BHTK.dtype).split((self.H * self.N, self.H * self.V))
        q_BHTN, q_BHTR = q_BHTK.split((self.N, self.R), -1)
        q_BHTC = q_BHTN @ w_k.unflatten(0, (self.H, self.N))
        q_BHTL = torch.cat([q_BHTC, q_BHTR.to(q_BHTC.dtype)], -1).to(kv_BSL.dtype)
        kv_BGSL = kv_BSL[:, None]
        if q_BHTL.shape[2] > 1:
            kv_BGSL = kv_BGSL.expand(-1, self.H, -1, -1)  # a view, where the op would copy it for every head
        # values are the first channels of the keys: the whole row is mixed, which copies nothing, and the rest dropped
        y_BHTC = self._mix(q_BHTL, kv_BGSL, kv_BGSL, ctx)[..., : self.C]
        return y_BHTC @ w_v.unflatten(0, (self.H, self.V)).to(y_BHTC.dtype).transpose(1, 2)

    def flops(self, context: int) -> float:
        return 2.0 * self.H * context * (self.K + self.V)

    def decode_flops(self, context: int) -> float:
        if self._absorbs(1, Growing({})):
            return 2.0 * self.H * context * (2 * self.C + self.R)
        # a token's own keys and values are among the products with weights
        return self.flops(context) + 2.0 * (context - 1) * self.C * self.H * (self.N + self.V)
