"""Softmax attention (Vaswani et al. 2017, arXiv 1706.03762, eq. 1), with the variants that today's models combine.

Grouped and multi-query heads (Ainslie et al. 2023, arXiv 2305.13245), sliding window (Beltagy et al. 2020, arXiv
2004.05150), a norm per head on queries and keys (Henry et al. 2020, arXiv 2010.04245), a soft cap on scores (Gemma 2,
arXiv 2408.00118), a free scale (T5 uses 1). Where the site has a memory it is a cross-attention.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field

from torchstone import ops
from torchstone.errors import TorchstoneError
from torchstone.model.attention import Attention
from torchstone.model.attention._heads import Heads, HeadsSpec
from torchstone.model.context import Aux, Context, Handoff
from torchstone.model.mask import BIDIRECTIONAL, Lowered, holds, lower
from torchstone.model.site import Gives, Site
from torchstone.model.state import Fixed, Growing, PartState, Ring, Slot
from torchstone.model.tokens import Tokens
from torchstone.ops import attention as kernels

__all__ = ["CrossAttention", "SelfAttention", "SoftmaxAttention", "SoftmaxHeads", "SoftmaxSpec", "mix_values"]


class SoftmaxSpec(HeadsSpec):
    """Multi-head softmax attention: grouped heads, window, QK-norm, soft-cap, free scale."""

    consumes: ClassVar[frozenset[str]] = frozenset({"rotation", "decaying rotation", "bias"})
    can_give: ClassVar[frozenset[str]] = frozenset({"keys_values", "probs", "queries_keys", "block_max", "fresh"})
    crosses: ClassVar[bool] = True
    offsets: ClassVar[bool] = True
    masks: ClassVar[frozenset[str]] = frozenset({"causal", "window", "blocks", "role", "prefix"})
    paper: ClassVar[str] = "Vaswani et al. 2017, arXiv 1706.03762"

    window: int | None = Field(None, ge=1)
    """A query sees itself and the window - 1 tokens before it; None sees all."""
    softcap: float | None = Field(None, gt=0)
    """Scores become cap * tanh(score / cap)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Rate at which probabilities are dropped in training."""

    @property
    def grows(self) -> bool:
        return self.window is None

    def build(self, site: Site) -> Attention:
        return CrossAttention(self, site) if site.memory_width is not None else SoftmaxAttention(self, site)


class SoftmaxHeads(Heads):
    """What self- and cross-attention share: the mixing itself."""

    spec: SoftmaxSpec

    def __init__(self, spec: SoftmaxSpec, site: Site) -> None:
        super().__init__(spec, site)
        self.gives = site.gives

    def attend(
        self,
        q_BHTK: torch.Tensor,
        k_BGSK: torch.Tensor,
        v_BGSK: torch.Tensor,
        low: Lowered,
        ctx: Context,
        decay: kernels.Decay | None = None,
        block: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """`mix_values` with this layer's scale, soft-cap and dropout."""
        keep = self.gives.probs and holds(q_BHTK.shape[2], k_BGSK.shape[2])
        return mix_values(
            q_BHTK, k_BGSK, v_BGSK, low, ctx, scale=self.scale, softcap=self.spec.softcap, dropout=self.spec.dropout,
            keep=keep, decay=decay, block=block,
        )  # fmt: skip

    def mix(
        self,
        q_BHTK: torch.Tensor,
        k_BGSK: torch.Tensor,
        v_BGSK: torch.Tensor,
        low: Lowered,
        ctx: Context,
        decay: kernels.Decay | None = None,
        block: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """As `attend`, after the output projection: (B, T, D)."""
        y, probs, best = self.attend(q_BHTK, k_BGSK, v_BGSK, low, ctx, decay, block)
        return self.joined(y, ctx), probs, best

    def flops(self, context: int) -> float:
        return 4.0 * self.H * self.K * min(context, self.spec.window or context)


class Own(NamedTuple):
    """What a self-attention works on: queries, and keys and values with those of the cache; the keys' tokens, their
    mask, how scores decay; queries before any rotation; keys before it, and values, of this forward's tokens alone."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    keys: Tokens
    low: Lowered
    decay: kernels.Decay | None
    plain_q: torch.Tensor
    fresh: tuple[torch.Tensor, torch.Tensor]


class SelfAttention(SoftmaxHeads):
    """What self-attentions share: positions, masks, and the cache of what each token has once."""

    rings = True
    cached: tuple[str, ...] = ("k", "v")
    """Names of its slots."""

    def __init__(self, spec: SoftmaxSpec, site: Site) -> None:
        super().__init__(spec, site)
        self.position = site.position(self.K, self.H)
        gives = "nothing" if site.position_spec is None else site.position_spec.gives
        self.biased, self.decays = gives == "bias", gives == "decaying rotation"

    def state_spec(self) -> tuple[Slot, ...]:
        growth: Literal["ring", "growing"] = "ring" if self.spec.window else "growing"
        return tuple(Slot(name, growth, (self.G, self.K), self.spec.window or 0, head_axis=0) for name in self.cached)

    def _lowered(self, ctx: Context) -> Lowered:
        return ctx.lowered(self.spec.window, self.position if self.biased else None)

    def _decay(self, ctx: Context, keys: Tokens | None = None, name: str = "") -> kernels.Decay | None:
        return ctx.decay(self.position, keys, name) if self.decays and self.position is not None else None

    def prepare(self, ctx: Context) -> None:
        if self.position is not None:
            ctx.rotation(self.position)
        if ctx.slots is None or not self.spec.window:
            self._lowered(ctx)
            self._decay(ctx)
        if self.gives.block_max:
            origin(ctx)

    def history(
        self, ctx: Context, state: PartState | None, **new_BGTK: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, ...], Tokens, Lowered, kernels.Decay | None]:
        """What is new with what the cache holds, each (B, G, S, K), the tokens of these S, their mask, and how scores
        decay."""
        new, keys = tuple(new_BGTK.values()), ctx.k
        if state is None:
            return new, keys, self._lowered(ctx), self._decay(ctx)
        new_BTGK = {name: x.transpose(1, 2) for name, x in new_BGTK.items()}
        if isinstance(state, Ring):
            held, keys = state.write(ctx.q, **new_BTGK)
            low = ctx.lowered(self.spec.window, self.position if self.biased else None, keys, "ring")
            decay = self._decay(ctx, keys, f"ring.{self.spec.window}")
        else:
            assert isinstance(state, Growing) and ctx.slots is not None
            held = state.write(ctx.slots, ctx.k.index.shape[1], **new_BTGK)
            low, decay = self._lowered(ctx), self._decay(ctx)
        return tuple(x.transpose(1, 2) for x in held), keys, low, decay


class SoftmaxAttention(SelfAttention):
    """Self-attention. Decode state: a growing cache, or a ring of the window."""

    def __init__(self, spec: SoftmaxSpec, site: Site) -> None:
        super().__init__(spec, site)
        self.qkv = self.fused(site)

    def forward(
        self,
        x_BTD: torch.Tensor,
        ctx: Context | None = None,
        state: PartState | None = None,
        given: Handoff | None = None,
    ) -> tuple[torch.Tensor, Handoff | None, Aux]:
        ctx = Context.alone(x_BTD, self.causal) if ctx is None else ctx
        own, gives = self.own(x_BTD, ctx, state), self.gives
        y, probs, best = self.attend(own.q, own.k, own.v, own.low, ctx, own.decay, gives.block_max)
        y_BTD = self.joined(self.beside(y, own.plain_q, ctx), ctx)
        if gives == Gives():
            return y_BTD, None, {}
        # where the probabilities are too many to be held, others make them again
        again = gives.queries_keys or (gives.probs and probs is None)
        handoff = Handoff(
            k=own.k if gives.keys_values or again else None,
            v=own.v if gives.keys_values else None,
            tokens=own.keys,
            probs=probs.to(own.v.dtype) if gives.probs and probs is not None else None,
            block_max=None if best is None else ctx.tap("block_max", best),
            block_of=gives.block_max,
            fresh=own.fresh if gives.fresh else None,
            q=own.q if again else None,
            key=ctx.key if again else None,
        )
        return y_BTD, handoff, {}

    def own(self, x_BTD: torch.Tensor, ctx: Context, state: PartState | None) -> Own:
        """What this layer's own projections and its cache give."""
        q, k, v = self.projected(x_BTD, ctx)
        plain_q, fresh = q, (k, v)
        rotation = None if self.position is None else ctx.rotation(self.position)
        if rotation is not None:
            q, k = rotation.q(q), rotation.k(k)
        (k, v), keys, low, decay = self.history(ctx, state, k=k, v=v)
        return Own(q.to(k.dtype), k, v, keys, low, decay, plain_q, fresh)

    def beside(self, y_BHTK: torch.Tensor, q_BHTK: torch.Tensor, ctx: Context) -> torch.Tensor:
        """What attention to other things makes of this one's output, given its queries before any rotation."""
        return y_BHTK


class CrossAttention(SoftmaxHeads):
    """Attention from the stream to the context's memory. Decode state: its keys and values, computed once."""

    def __init__(self, spec: SoftmaxSpec, site: Site) -> None:
        super().__init__(spec, replace(site, gives=Gives()))  # the self-attention beside it is what gives
        assert site.memory_width is not None
        self.q = site.linear(site.width, self.H * self.K, "q", bias=spec.biased("q"))
        self.kv = site.linear(site.memory_width, (self.G * self.K,) * 2, ("k", "v"), bias=spec.biased("k", "v"))

    def state_spec(self) -> tuple[Slot, ...]:
        return tuple(Slot(name, "fixed", (self.G, self.K), head_axis=0) for name in ("k", "v"))

    def prepare(self, ctx: Context) -> None:
        self._lowered(ctx)

    def _lowered(self, ctx: Context) -> Lowered:
        assert ctx.memory is not None, "a cross-attention needs a memory in its context"
        tokens = ctx.memory.tokens
        return ctx.once("mask.memory", lambda: lower(BIDIRECTIONAL, _undivided(ctx.q), tokens, "general"))

    def forward(
        self,
        x_BTD: torch.Tensor,
        ctx: Context | None = None,
        state: PartState | None = None,
        given: Handoff | None = None,
    ) -> tuple[torch.Tensor, Handoff | None, Aux]:
        assert ctx is not None and ctx.memory is not None, "a cross-attention needs a memory in its context"
        memory = ctx.memory
        q = self.heads(self.q(x_BTD), self.H)

        def project() -> dict[str, torch.Tensor]:
            k, v = self.kv(memory.x).split(self.G * self.K, -1)
            k, v = self.heads(k, self.G), self.heads(v, self.G)
            return {"k": k if self.k_norm is None else self.k_norm(k), "v": v}

        stored = state.once(project) if isinstance(state, Fixed) else project()
        q = ctx.tap("q", q if self.q_norm is None else self.q_norm(q))
        k, v = ctx.tap("k", stored["k"]), ctx.tap("v", stored["v"])
        y_BTD = self.mix(q.to(k.dtype), k, v, self._lowered(ctx), ctx)[0]
        return y_BTD, None, {}


def mix_values(
    q_BHTK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSV: torch.Tensor,
    low: Lowered,
    ctx: Context,
    *,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
    keep: bool = False,
    decay: kernels.Decay | None = None,
    block: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Mixed values (B, H, T, V) under a lowered mask; the probabilities (B, H, T, S) if somebody listens to them or
    `keep` asks for them, after taps and dropout; where `block` is not 0, the largest probability of each block of keys
    (B, G, T, N). `dropout` is the rate at which probabilities are dropped.

    Raises:
        TorchstoneError: dropout, and too many tokens to hold all probabilities.
    """
    probs = best = None
    dropping = dropout > 0 and ctx.key is not None
    arguments: dict[str, Any] = {"scale": scale, "softcap": softcap}
    if block:
        assert decay is None, "maxima of blocks are of scores that do not decay"
    else:
        arguments["decay"] = decay
    blocks: dict[str, Any] = {"block": block, "first_BT": origin(ctx)} if block else {}
    if keep or dropping or ctx.hears("probs"):
        if low.mask_of is not None:
            if not (keep or ctx.hears("probs")):
                raise TorchstoneError(
                    f"attention.dropout: {q_BHTK.shape[2]} tokens, and it holds all probabilities; set it to 0 for "
                    "long sequences"
                )
            low = Lowered(matrix_B1TS=low.mask_of(0, q_BHTK.shape[2])[2])
        arguments |= {"causal": low.causal, "mask_BHTS": low.matrix_B1TS}
        if block:
            y, probs, best = kernels.attention_block_max_reference(q_BHTK, k_BGSK, v_BGSV, **blocks, **arguments)
        else:
            y, probs = kernels.attention_probs(q_BHTK, k_BGSK, v_BGSV, **arguments)
        tapped = ctx.drop(ctx.tap("probs", probs), dropout, "probs")
        if tapped is not probs:
            y, probs = kernels.weighted_values(tapped, ops.at_least_float32(v_BGSV)).to(v_BGSV.dtype), tapped
    elif block:
        arguments |= {"causal": low.causal, "mask_BHTS": low.matrix_B1TS, "mask_of": low.mask_of}
        y, best = kernels.attention_block_max(q_BHTK, k_BGSK, v_BGSV, **blocks, **arguments)
    elif low.mask_of is not None:
        y = kernels.blockwise(q_BHTK, k_BGSK, v_BGSV, mask_of=low.mask_of, **arguments)
    else:
        y = kernels.attention(q_BHTK, k_BGSK, v_BGSV, causal=low.causal, mask_BHTS=low.matrix_B1TS, **arguments)
    return y, probs, best


def _undivided(q: Tokens) -> Tokens:
    """Queries without documents: all of a row reads the same memory."""
    return Tokens(q.index, valid=q.valid)


def origin(ctx: Context) -> torch.Tensor | None:
    """(B|1, T): where each query's blocks of keys begin: at the first token of its document, after any padding on the
    left. None where that is 0 for all."""

    def make() -> torch.Tensor | None:
        start, valid = ctx.q.start, ctx.k.valid
        if start is None and valid is not None:
            start = valid.long().argmax(1, keepdim=True)
        # a padding token before the document is one of its own
        return None if start is None else torch.minimum(start, ctx.q.index)

    return ctx.once("origin", make)
