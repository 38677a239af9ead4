"""Hash layers: a token's experts are a fixed random function of its id (Roller et al. 2021, arXiv 2106.04426).

Nothing is learned and nothing changes, so the same id has the same experts in every layer and at every step. With
``gating: sigmoid`` what is chosen counts sigmoid(w_i . x) instead of 1 / K, as in StableMoE.

Shapes: B rows, T tokens, D width, E experts, K active.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from torchstone.model.context import Context
from torchstone.model.feedforward.router import Router, RouterSpec, ids_of
from torchstone.model.site import Site
from torchstone.ops import noise

__all__ = ["HashRouter", "HashSpec"]


class HashSpec(RouterSpec):
    """A fixed random function of the token id."""

    paper: ClassVar[str] = "Roller et al. 2021, arXiv 2106.04426"
    reads_ids: ClassVar[bool] = True

    gating: Literal["even", "sigmoid"] = "even"
    """What a chosen expert counts: 1 / K, or a sigmoid of a learned score."""
    seed: int = Field(0, ge=0, lt=1 << 31)
    """Which function."""

    def build(self, site: Site, experts: int, active: int) -> Router:
        return HashRouter(self, site, experts, active)


class HashRouter(Router):
    """Scores play no part in choices."""

    weight: nn.Parameter | None

    def __init__(self, spec: HashSpec, site: Site, experts: int, active: int) -> None:
        super().__init__(experts, active)
        self.spec, self.init = spec, site.init
        learned = spec.gating == "sigmoid"
        self.register_parameter("weight", nn.Parameter(torch.empty(experts, site.width)) if learned else None)

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        self.init(parameter, "router", generator)

    def score(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        if self.weight is None:
            return x_BTD.new_full((*x_BTD.shape[:-1], self.E), 1.0 / self.K)
        return F.linear(x_BTD, self.weight.to(x_BTD.dtype)).sigmoid()

    def select(self, scores_BTE: torch.Tensor, ctx: Context) -> torch.Tensor:
        ids_BT = ids_of(ctx, scores_BTE.shape[0], "hash")
        # each id orders the experts by random numbers of its own
        return noise.bits(noise.mix(ids_BT, self.spec.seed), self.E).topk(self.K, -1).indices

    def gate(self, scores_BTE: torch.Tensor, experts_BTK: torch.Tensor) -> torch.Tensor:
        return scores_BTE.gather(-1, experts_BTK)
