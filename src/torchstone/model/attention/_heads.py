"""What attentions of heads over keys and values of heads share: sizes, norms of queries and keys, and projections.

Shapes: B rows, T queries, D width, E width of all heads, H heads, G key/value heads, K head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from torchstone.model.attention import Attention, AttentionSpec
from torchstone.model.context import Context
from torchstone.model.site import Site

if TYPE_CHECKING:
    from torchstone.model.stack import LayerSpec

__all__ = ["Heads", "HeadsSpec"]


class HeadsSpec(AttentionSpec):
    """Query heads, in groups that share a head of keys and values."""

    divided: ClassVar[tuple[str, ...]] = ("heads", "kv_heads")

    kv_heads: int | None = Field(None, ge=1)
    """Key/value heads, a divisor of `heads`; None means as many as `heads`, 1 is multi-query."""
    head_dim: int | None = Field(None, ge=1)
    """Dimension of a head; None means width / heads."""
    qk_norm: bool = False
    """Normalise each head of queries and keys, with the model's kind of norm."""
    scale: float | None = Field(None, gt=0)
    """Factor on scores; None means 1 / sqrt(head_dim), 1 is unscaled."""
    bias: Literal["none", "qkv", "qvo", "all"] = "none"
    """Which projections have a bias; qvo is all but keys, whose bias adds one number to all scores of a query."""

    def head_size(self, width: int) -> int:
        return self.head_dim or width // self.heads

    def biased(self, *roles: str) -> tuple[bool, ...]:
        """Which of the slices of these roles ("q", "k", "v", "out") have a bias."""
        having = {"none": (), "qkv": ("q", "k", "v"), "qvo": ("q", "v", "out"), "all": ("q", "k", "v", "out")}
        return tuple(role in having[self.bias] for role in roles)

    def illegal(self, layer: LayerSpec, width: int) -> str | None:
        if self.head_dim is None and width % self.heads:
            return f"attention.heads: {self.heads} heads do not divide width {width}"
        if self.heads % (self.kv_heads or self.heads):
            return f"attention.kv_heads: {self.kv_heads} does not divide {self.heads} heads"
        return super().illegal(layer, width) or layer.position.illegal(self.head_size(width))


class Heads(Attention):
    """Sizes, norms and the output projection. `qkv` is set by kinds that project the stream once for all three."""

    makes_queries = makes_keys = True
    """Whether it has queries and keys of its own to normalise."""
    qkv: nn.Module

    def __init__(self, spec: HeadsSpec, site: Site) -> None:
        super().__init__()
        self.spec, self.causal = spec, site.causal
        self.H, self.G = spec.heads, spec.kv_heads or spec.heads
        self.K = spec.head_size(site.width)
        self.scale = self.K**-0.5 if spec.scale is None else spec.scale
        self.q_norm = site.norm(self.K) if spec.qk_norm and self.makes_queries else None
        self.k_norm = site.norm(self.K) if spec.qk_norm and self.makes_keys else None
        self.inner_norm = site.inner_norm(self.H * self.K)
        self.out = site.linear(self.H * self.K, site.width, "out", bias=spec.biased("out"))

    def fused(self, site: Site) -> nn.Module:
        """Queries, keys and values of the stream as one product, for `qkv`."""
        sizes = (self.H * self.K, self.G * self.K, self.G * self.K)
        return site.linear(site.width, sizes, ("q", "k", "v"), bias=self.spec.biased("q", "k", "v"))

    def heads(self, x_BTE: torch.Tensor, heads: int) -> torch.Tensor:
        """(B, T, heads * K) -> (B, heads, T, K)."""
        return x_BTE.unflatten(-1, (heads, self.K)).transpose(1, 2)

    def projected(self, x_BTD: torch.Tensor, ctx: Context) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (B, H, T, K), keys and values (B, G, T, K) of the stream, before any rotation."""
        q, k, v = self.qkv(x_BTD).split((self.H * self.K, self.G * self.K, self.G * self.K), -1)
        q, k, v = self.heads(q, self.H), self.heads(k, self.G), self.heads(v, self.G)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return ctx.tap("q", q), ctx.tap("k", k), ctx.tap("v", v)

    def joined(self, y_BHTK: torch.Tensor, ctx: Context) -> torch.Tensor:
        """Heads side by side, and the output projection: (B, T, D)."""
        y_BTE = ctx.tap("mixed", self.inner_norm(y_BHTK.transpose(1, 2).flatten(-2)))
        return ctx.tap("out", self.out(y_BTE))
