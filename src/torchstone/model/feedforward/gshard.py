"""Experts that are whole networks, as GShard (Lepikhin et al. 2020, arXiv 2006.16668) and TorchScale (Ma et al. 2022,
arXiv 2211.13184) have them: with biases, and each with a norm of its own where the residual wants one.

    y = sum over the kept of the chosen experts  g_i (W2_i norm_i(act(W1_i x + b1_i)) + b2_i)

It is `moe` in all else, with three more rules. A choice whose gate is 0 takes no place in an expert. With `renormalise`
the gates of the choices that were kept are divided by their sum, so that a token that lost one expert has all of the
other. With `eval_capacity` experts are full at evaluation too, at a share of all tokens.

Shapes: B rows, T tokens, D width, E experts, K active, M = B * T * K rows, F hidden units of an expert.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from torchstone.model.context import Aux, Context, add_aux
from torchstone.model.feedforward import Activation, FeedForward
from torchstone.model.feedforward.moe import MoE, MoESpec
from torchstone.model.feedforward.router import RouterSpec
from torchstone.model.site import Site
from torchstone.ops.experts import Groups, collect, group, spread
from torchstone.spec import Part, part

__all__ = ["GShard", "GShardSpec"]


class GShardSpec(MoESpec):
    """Experts that are whole networks, with biases and norms of their own, of which each token takes one or two."""

    paper: ClassVar[str] = "Lepikhin et al. 2020, arXiv 2006.16668"

    gated: bool = False
    """Whether an expert is ``down(act(gate(x)) * up(x))`` or ``down(act(up(x)))``."""
    activation: Activation = "gelu"
    """Of an expert's hidden units or their gate: silu, gelu, gelu_tanh, relu or relu2."""
    bias: bool = True
    """Whether both projections of an expert have a bias."""
    router: Part[RouterSpec] = part("gshard", "router")
    """Who chooses."""
    renormalise: bool = False
    """Whether gates are divided by the sum of those whose experts took the token."""
    eval_capacity: float | None = Field(None, gt=0)
    """Tokens that an expert takes at evaluation, as a share of all; None drops none."""

    def build(self, site: Site) -> FeedForward:
        return GShard(self, site)


class Vectors(nn.Module):
    """A vector (O,) for each expert, one after the other, for rows that are grouped by expert."""

    def __init__(self, count: int, width: int, first: float) -> None:
        super().__init__()
        self.count, self.slices, self.first = count, (width,) * count, first
        self.weight = nn.Parameter(torch.empty(count * width))

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        parameter.fill_(self.first)

    def forward(self, groups: Groups, dtype: torch.dtype) -> torch.Tensor:
        """(M, O); rows without an expert get some vector, and count nothing."""
        expert_M = groups.expert_M.clamp(max=self.count - 1)
        return self.weight.view(self.count, -1).index_select(0, expert_M).to(dtype)


class GShard(MoE):
    """(B, T, D) -> (B, T, D)."""

    spec: GShardSpec

    def __init__(self, spec: GShardSpec, site: Site) -> None:
        super().__init__(spec, site)
        hidden, E = spec.width(site.width), spec.experts
        self.up_bias = Vectors(E, hidden * (1 + spec.gated), 0.0) if spec.bias else None
        self.down_bias = Vectors(E, site.width, 0.0) if spec.bias else None
        # one norm without a gain for all, and a gain and a bias for each
        self.inner_gain = self.inner_bias = None
        if not isinstance(self.inner_norm, nn.Identity):
            options = {name: getattr(site.norm_spec, name, False) for name in ("gain", "bias")}
            self.inner_gain = Vectors(E, hidden, 1.0) if options["gain"] else None
            self.inner_bias = Vectors(E, hidden, 0.0) if options["bias"] else None
            bare = {name: False for name, is_on in options.items() if is_on}
            self.inner_norm = site.norm_spec.model_copy(update=bare).build(hidden)

    @property
    def inactive_parameters(self) -> int:
        vectors = (self.up_bias, self.down_bias, self.inner_gain, self.inner_bias)
        own = sum(each.weight.numel() for each in vectors if each is not None)
        return super().inactive_parameters + own - own * self.spec.active // self.spec.experts

    def forward(self, x_BTD: torch.Tensor, ctx: Context | None = None) -> tuple[torch.Tensor, Aux]:
        ctx = Context.alone(x_BTD) if ctx is None else ctx
        E = self.spec.experts
        routing = self.router(x_BTD, ctx.inside("router"))
        experts_BTK, aux = self._taken(torch.where(routing.gates == 0, E, routing.experts), ctx)
        gates_BTK = torch.where(experts_BTK < E, routing.gates, 0.0)
        if self.spec.renormalise:
            gates_BTK = gates_BTK / gates_BTK.sum(-1, keepdim=True).clamp(min=torch.finfo(gates_BTK.dtype).eps)
        groups = group(experts_BTK.flatten(0, 1), E)
        h = _plus(self.up(spread(x_BTD.flatten(0, 1), groups), groups), self.up_bias, groups)
        if self.spec.gated:
            gate, up = h.chunk(2, -1)
            h = self.act(gate) * up
        else:
            h = self.act(h)
        h = self.inner_norm(h)
        if self.inner_gain is not None:
            h = h * self.inner_gain(groups, h.dtype)
        h = ctx.drop(_plus(h, self.inner_bias, groups), self.dropout, "hidden")
        y_MD = _plus(self.down(h, groups), self.down_bias, groups)
        y = collect(y_MD, gates_BTK.flatten(0, 1), groups).view(x_BTD.shape)
        if self.shared is not None:
            y = y + self.shared(x_BTD, ctx.inside("shared"))
        if self.training:
            aux = add_aux(aux, self._aux(routing))
        return ctx.tap("out", y), aux

    def _taken(self, experts_BTK: torch.Tensor, ctx: Context) -> tuple[torch.Tensor, Aux]:
        """As `moe`, but all first choices have the place before any second one, and at evaluation too."""
        B, T, K = experts_BTK.shape
        E, spec = self.spec.experts, self.spec
        if ctx.q.valid is not None:
            experts_BTK = torch.where(ctx.q.valid[..., None], experts_BTK, E)
        choices = (experts_BTK < E).sum()
        room: torch.Tensor | int
        if ctx.key is not None and spec.capacity is not None:
            room = torch.ceil(spec.capacity * choices.double() / E)  # float32 makes 61 of 0.6 * 400 / 4
        elif ctx.key is None and spec.eval_capacity is not None:
            room = math.ceil(spec.eval_capacity * B * T)
        else:
            return experts_BTK, {}
        groups = group(experts_BTK.permute(2, 1, 0).reshape(-1, 1), E)  # earlier columns have the place
        starts_M = torch.cat([groups.ends_E.new_zeros(1), groups.ends_E]).index_select(0, groups.expert_M)
        rank_M = torch.arange(B * T * K, device=starts_M.device) - starts_M
        rank_BTK = rank_M.index_select(0, groups.place_M).view(K, T, B).permute(2, 1, 0)
        over_BTK = (rank_BTK >= room) & (experts_BTK < E)
        aux: Aux = {"dropped": (over_BTK.sum(), choices)} if ctx.key is not None else {}
        return torch.where(over_BTK, E, experts_BTK), aux


def _plus(y_MO: torch.Tensor, vectors: Vectors | None, groups: Groups) -> torch.Tensor:
    return y_MO if vectors is None else y_MO + vectors(groups, y_MO.dtype)
