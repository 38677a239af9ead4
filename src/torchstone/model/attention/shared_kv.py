"""Attention to keys and values that are made once and shared by many layers (Sun et al. 2024, arXiv 2405.05254, eqs. 2
and 3).

`SharedKeysValues` makes them from a norm of its own and keeps them; each `SharedKV` layer has queries and an output
projection and nothing else. Only a stack can put the two together.

Shapes: B rows, T queries, S keys, D width, H heads, G key/value heads, K head dimension.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from torchstone.model.attention import Attention
from torchstone.model.attention.softmax import SoftmaxHeads, SoftmaxSpec
from torchstone.model.context import Aux, Context, Handoff
from torchstone.model.mask import Lowered
from torchstone.model.site import Site
from torchstone.model.state import Growing, PartState, Slot

__all__ = ["SharedKV", "SharedKVSpec", "SharedKeysValues"]


class SharedKVSpec(SoftmaxSpec):
    """Softmax attention with queries of its own to keys and values that it is handed."""

    offered: ClassVar[bool] = False
    consumes: ClassVar[frozenset[str]] = frozenset({"rotation", "bias"})
    can_give: ClassVar[frozenset[str]] = frozenset()
    takes: ClassVar[frozenset[str]] = frozenset({"keys_values"})
    crosses: ClassVar[bool] = False
    paper: ClassVar[str] = "Sun et al. 2024, arXiv 2405.05254"

    @property
    def grows(self) -> bool:
        return False

    def build(self, site: Site) -> Attention:
        return SharedKV(self, site)


class SharedKV(SoftmaxHeads):
    """Has no decode state: whoever made the keys and values keeps them."""

    makes_keys = False

    def __init__(self, spec: SharedKVSpec, site: Site) -> None:
        super().__init__(spec, site)
        self.position = site.position(self.K, self.H)
        self.biased = site.position_spec is not None and site.position_spec.gives == "bias"
        self.q = site.linear(site.width, self.H * self.K, "q", bias=spec.biased("q"))

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
        assert ctx is not None and given is not None and given.k is not None and given.v is not None
        q = self.heads(self.q(x_BTD), self.H)
        q = ctx.tap("q", q if self.q_norm is None else self.q_norm(q))
        rotation = None if self.position is None else ctx.rotation(self.position)
        q = q if rotation is None else rotation.q(q)
        y_BTD = self.mix(q.to(given.k.dtype), given.k, given.v, self._lowered(ctx), ctx)[0]
        return y_BTD, None, {}


class SharedKeysValues(nn.Module):
    """Keys and values (B, G, S, K) for all `SharedKV` layers of a stack. Decode state: a growing cache."""

    def __init__(self, spec: SharedKVSpec, site: Site) -> None:
        super().__init__()
        self.G, self.K = spec.kv_heads or spec.heads, spec.head_size(site.width)
        self.norm = site.norm(before_linear=True)
        self.kv = site.linear(site.width, (self.G * self.K,) * 2, ("k", "v"), bias=spec.biased("k", "v"))
        self.k_norm = site.norm(self.K) if spec.qk_norm else None
        biased = site.position_spec is not None and site.position_spec.gives == "bias"  # of scores, which others make
        self.position = None if biased else site.position(self.K, spec.heads)

    def state_spec(self) -> tuple[Slot, ...]:
        return tuple(Slot(name, "growing", (self.G, self.K), head_axis=0) for name in ("k", "v"))

    def prepare(self, ctx: Context) -> None:
        if self.position is not None:
            ctx.rotation(self.position)

    def forward(self, x_BTD: torch.Tensor, ctx: Context, state: PartState | None = None) -> Handoff:
        """Of the tokens in the stream, and with a state of all before them."""
        k, v = self.kv(self.norm(x_BTD)).split(self.G * self.K, -1)
        k, v = (x.unflatten(-1, (self.G, self.K)).transpose(1, 2) for x in (k, v))
        k = k if self.k_norm is None else self.k_norm(k)
        k, v = ctx.tap("k", k), ctx.tap("v", v)
        rotation = None if self.position is None else ctx.rotation(self.position)
        k = k if rotation is None else rotation.k(k)
        if state is not None:
            assert isinstance(state, Growing) and ctx.slots is not None
            k, v = state.write(ctx.slots, ctx.k.index.shape[1], k=k.transpose(1, 2), v=v.transpose(1, 2))
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        return Handoff(k, v, ctx.k)
