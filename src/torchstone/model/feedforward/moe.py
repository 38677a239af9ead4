"""A mixture of experts: many feed-forward networks of which each token takes a few (Shazeer et al. 2017, arXiv
1701.06538), fine-grained and with shared ones (DeepSeekMoE, Dai et al. 2024, arXiv 2401.06066, eqs. 9 to 11).

    y = sum over shared experts F_i(x) + sum over the K chosen experts g_i F_i(x)

Which are chosen, and what each counts, is the router's. Shared experts together are one network of their joint width.
Padding is given to no expert and counts nowhere. Where the residual wants a norm before outputs, one serves all chosen
experts.

With a capacity, in a forward that trains, an expert takes ceil(capacity * K * tokens / E) tokens and drops the rest,
which then pass by on the stream alone. Those that come first have the place, whatever their row, so that no token is
dropped for one that comes after it. Without a dropout key nothing is dropped.

In training `aux` has the router's losses, for the metrics `load_max` (the load of the fullest expert over the mean),
`load_entropy` (of the load, 1 if all experts have the same) and `dropped` (a share of choices), and as the layer's own
`load.G`: tokens that chose each expert, in part number G of those side by side.

Shapes: B rows, T tokens, D width, E experts, K active, N = B * T, M = N * K rows, F hidden units of an expert.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from torchstone.model.context import Aux, Context, add_aux
from torchstone.model.feedforward import ACTIVATIONS, Activation, FeedForward, FeedForwardSpec
from torchstone.model.feedforward.router import RouterSpec, Routing
from torchstone.model.site import Site
from torchstone.ops.experts import collect, group, spread
from torchstone.spec import Part, part

if TYPE_CHECKING:
    from torchstone.model.stack import LayerSpec

__all__ = ["MoE", "MoESpec"]


class MoESpec(FeedForwardSpec):
    """Experts of which each token takes a few; `hidden` is one expert's, by default the usual width over active."""

    paper: ClassVar[str] = "Shazeer et al. 2017, arXiv 1701.06538; Dai et al. 2024, arXiv 2401.06066"

    experts: int = Field(8, ge=1)
    """E, experts that are chosen from."""
    active: int = Field(2, ge=1)
    """K, how many of them each token takes."""
    shared: int = Field(0, ge=0)
    """Experts that every token takes besides."""
    gated: bool = True
    """Whether an expert is ``down(act(gate(x)) * up(x))`` or ``down(act(up(x)))``."""
    activation: Activation = "silu"
    """Of an expert's hidden units or their gate: silu, gelu, gelu_tanh, relu or relu2."""
    router: Part[RouterSpec] = part("topk", "router")
    """Who chooses."""
    capacity: float | None = Field(None, gt=0)
    """Tokens that an expert takes in training, over those it would have if all had the same; None drops none."""

    @property
    def reads_ids(self) -> bool:
        return self.router.reads_ids

    def illegal(self, layer: LayerSpec, width: int) -> str | None:
        if self.active > self.experts:
            return f"ffn.active: {self.active} active of {self.experts} experts"
        why = self.router.illegal(self.experts, self.active)
        return f"ffn.router.{why}" if why else None

    def width(self, width: int) -> int:
        """Hidden units of one expert, in a stream of `width`."""
        usual = 8 * width / 3 if self.gated else 4 * width
        return self.hidden or 8 * math.ceil(usual / (8 * (self.active + self.shared)))

    def build(self, site: Site) -> FeedForward:
        return MoE(self, site)


class MoE(FeedForward):
    """(B, T, D) -> (B, T, D)."""

    def __init__(self, spec: MoESpec, site: Site) -> None:
        super().__init__()
        hidden, E, D = spec.width(site.width), spec.experts, site.width
        self.spec, self.group = spec, site.group
        self.act, self.dropout = ACTIVATIONS[spec.activation], site.dropout
        self.router = spec.router.build(site, E, spec.active)
        self.up = site.bank(E, D, *(((hidden, hidden), ("gate", "up")) if spec.gated else (hidden, "up")))
        self.inner_norm = site.inner_norm(hidden)
        self.down = site.bank(E, hidden, D, "down")
        self.shared = _Shared(spec, hidden * spec.shared, site) if spec.shared else None

    @property
    def inactive_parameters(self) -> int:
        """Parameters of the experts that a token does not take."""
        banks = sum(p.numel() for bank in (self.up, self.down) for p in bank.parameters())
        return banks - banks * self.spec.active // self.spec.experts

    def forward(self, x_BTD: torch.Tensor, ctx: Context | None = None) -> tuple[torch.Tensor, Aux]:
        ctx = Context.alone(x_BTD) if ctx is None else ctx
        routing: Routing = self.router(x_BTD, ctx.inside("router"))
        experts_BTK, aux = self._taken(routing.experts, ctx)
        groups = group(experts_BTK.flatten(0, 1), self.spec.experts)
        h = self.up(spread(x_BTD.flatten(0, 1), groups), groups)
        h = _activated(h, self.act, self.spec.gated)
        h = ctx.drop(self.inner_norm(h), self.dropout, "hidden")
        y = collect(self.down(h, groups), routing.gates.flatten(0, 1), groups).view(x_BTD.shape)
        if self.shared is not None:
            y = y + self.shared(x_BTD, ctx.inside("shared"))
        if self.training:
            aux = add_aux(aux, self._aux(routing))
        return ctx.tap("out", y), aux

    def _taken(self, experts_BTK: torch.Tensor, ctx: Context) -> tuple[torch.Tensor, Aux]:
        """Experts (B, T, K) that take a token, E where none does: of padding, and beyond the capacity."""
        B, T, K = experts_BTK.shape
        E, capacity = self.spec.experts, self.spec.capacity
        if ctx.q.valid is not None:
            experts_BTK = torch.where(ctx.q.valid[..., None], experts_BTK, E)
        if capacity is None or ctx.key is None:
            return experts_BTK, {}
        choices = (experts_BTK < E).sum()
        groups = group(experts_BTK.transpose(0, 1).reshape(B * T, K), E)  # earlier columns have the place
        starts_M = torch.cat([groups.ends_E.new_zeros(1), groups.ends_E]).index_select(0, groups.expert_M)
        rank_M = torch.arange(B * T * K, device=starts_M.device) - starts_M
        rank_BTK = rank_M.index_select(0, groups.place_M).view(T, B, K).transpose(0, 1)
        over_BTK = (rank_BTK >= torch.ceil(capacity * choices / E)) & (experts_BTK < E)
        return torch.where(over_BTK, E, experts_BTK), {"dropped": (over_BTK.sum(), choices)}

    def _aux(self, routing: Routing) -> Aux:
        with torch.no_grad():
            counts_E = routing.counts.sum(0)
            tokens, one = counts_E.sum() / self.spec.active, torch.ones_like(counts_E[0])
            share_E = counts_E / counts_E.sum().clamp(min=1)
            entropy = torch.special.entr(share_E).sum() / math.log(max(2, self.spec.experts))
        aux: Aux = {name: (total, tokens) for name, total in routing.losses.items()}
        aux["load_max"] = self.spec.experts * share_E.amax(), one
        aux["load_entropy"] = entropy, one
        aux[f":load.{self.group}"] = counts_E, tokens.expand_as(counts_E)
        return aux


class _Shared(torch.nn.Module):
    """Experts that every token takes, as one network: the projections of a dense feed-forward."""

    def __init__(self, spec: MoESpec, hidden: int, site: Site) -> None:
        super().__init__()
        self.gated, self.act, self.dropout = spec.gated, ACTIVATIONS[spec.activation], site.dropout
        self.up = site.linear(site.width, *(((hidden, hidden), ("gate", "up")) if spec.gated else (hidden, "up")))
        self.inner_norm = site.inner_norm(hidden)
        self.down = site.linear(hidden, site.width, "down")

    def forward(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        h = _activated(self.up(x_BTD), self.act, self.gated)
        return self.down(ctx.drop(self.inner_norm(h), self.dropout, "hidden"))


def _activated(h: torch.Tensor, act: Any, gated: bool) -> torch.Tensor:
    if not gated:
        return act(h)
    gate, up = h.chunk(2, -1)
    return act(gate) * up
