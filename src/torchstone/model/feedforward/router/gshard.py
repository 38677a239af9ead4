"""GShard's router (Lepikhin et al. 2020, arXiv 2006.16668, algorithm 1): the best expert, and a second one by a policy.

    s = softmax(W x)    gates = s_1, s_2 of the best and the second, divided by their sum if `normalise`

always    the second is the next best
random    so it is, and counts with probability 2 g_2 alone: a second choice of little weight is spared
sampling  the second is drawn from the softmax over the others (Gumbel-max)

Without a dropout key, as in evaluation, all three are `always`. The balance loss is about first choices:
``balance * E * sum_i (share of tokens whose best is i) * (mean of s_i)``, which is `balance` where both are uniform.

With `rank`, scores are taken in a space of few dimensions, with one vector of length 1 for each expert. This is what
TorchScale's ``use_xmoe`` computes (Ma et al. 2022, arXiv 2211.13184); X-MoE's own router is `cosine`.

Shapes: B rows, T tokens, D width, E experts, K active (1 or 2), C dimensions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from torchstone.model.context import Context
from torchstone.model.feedforward.router import Router, Routing
from torchstone.model.feedforward.router._scored import ScoredRouter, ScoredSpec
from torchstone.model.site import Site
from torchstone.ops import noise

__all__ = ["GShardRouter", "GShardRouterSpec"]


class GShardRouterSpec(ScoredSpec):
    """The best expert, and a second one that is the next best, or drawn, or left out by chance."""

    paper: ClassVar[str] = "Lepikhin et al. 2020, arXiv 2006.16668"

    second: Literal["always", "random", "sampling"] = "random"
    """When training: the next best always counts, or with probability twice its gate, or another is drawn."""
    rank: int | None = Field(None, ge=1)
    """C, dimensions of the space that scores are taken in; None takes them in the stream."""

    def illegal(self, experts: int, active: int) -> str | None:
        if active > 2:
            return f"second: {active} active experts, and gshard chooses one or two"
        return super().illegal(experts, active)

    def build(self, site: Site, experts: int, active: int) -> Router:
        return GShardRouter(self, site, experts, active)


class GShardRouter(ScoredRouter):
    """Scores are probabilities. A second expert that chance leaves out has the gate 0."""

    def __init__(self, spec: GShardRouterSpec, site: Site, experts: int, active: int) -> None:
        super().__init__(spec, experts, active)
        self.spec, self.init = spec, site.init
        if spec.rank is None:
            self.weight = nn.Parameter(torch.empty(experts, site.width))
        else:
            self.down = nn.Parameter(torch.empty(spec.rank, site.width))
            self.vectors = nn.Parameter(torch.empty(experts, spec.rank))

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        if name == "vectors":
            nn.init.orthogonal_(parameter, gain=0.32, generator=generator)
        else:
            self.init(parameter, "router", generator)

    def score(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        dtype = x_BTD.dtype
        if self.spec.rank is None:
            return F.linear(x_BTD, self.weight.to(dtype)).softmax(-1)
        e_EC = F.normalize(self.vectors.to(dtype), dim=-1, eps=1e-4)
        return F.linear(F.linear(x_BTD, self.down.to(dtype)), e_EC).softmax(-1)

    def select(self, scores_BTE: torch.Tensor, ctx: Context) -> torch.Tensor:
        if self.K == 1 or self.spec.second != "sampling" or ctx.key is None:
            return self.best(scores_BTE)
        first_BT1 = scores_BTE.argmax(-1, keepdim=True)
        u_BTE = self._uniform(ctx, scores_BTE).clamp(1e-12, 1 - 1e-7)
        noisy_BTE = scores_BTE.log() - torch.log(-torch.log(u_BTE))
        second_BT1 = noisy_BTE.scatter(-1, first_BT1, float("-inf")).argmax(-1, keepdim=True)
        return torch.cat([first_BT1, second_BT1], -1)

    def forward(self, x_BTD: torch.Tensor, ctx: Context) -> Routing:
        routing = super().forward(x_BTD, ctx)
        if self.K == 1 or self.spec.second != "random" or ctx.key is None:
            return routing
        first_BT, second_BT = routing.gates.unbind(-1)
        kept_BT = 2 * second_BT.detach() > self._uniform(ctx, second_BT)
        return replace(routing, gates=torch.stack([first_BT, torch.where(kept_BT, second_BT, 0.0)], -1))

    def _uniform(self, ctx: Context, like: torch.Tensor) -> torch.Tensor:
        key = ctx.inside("second").key
        assert key is not None
        return noise.uniform(key, like.numel()).view(like.shape).to(like.dtype)

    def losses(
        self, scores_BTE: torch.Tensor, routing: Routing, valid_BT: torch.Tensor, ctx: Context
    ) -> dict[str, torch.Tensor]:
        found = super().losses(scores_BTE, routing, valid_BT, ctx)
        if self.spec.balance:
            first_N = routing.experts[..., 0].flatten()
            valid_N = valid_BT.flatten().to(scores_BTE.dtype)
            first_E = scores_BTE.new_zeros(self.E).scatter_add(0, first_N, valid_N)
            shares_E = torch.where(valid_BT[..., None], scores_BTE, 0.0).sum((0, 1))
            tokens = valid_BT.sum().clamp(min=1)
            found["balance_loss"] = self.spec.balance * self.E * (first_E * shares_E).sum() / tokens
        return found
