"""The usual router: a softmax over experts, of which the best K count (Shazeer et al. 2017, arXiv 1701.06538).

    s = softmax(W x)    gates = scale * s_i of the K best, divided by their sum if `normalise`

Without `normalise` this is DeepSeekMoE's (arXiv 2401.06066, eqs. 9 to 11), whose gates add up to less than 1; with it,
Mixtral's (arXiv 2401.04088). With `groups` and `keep_groups` a token's experts are those of the groups whose best
expert scores highest: DeepSeek-V2's device-limited routing (arXiv 2405.04434, section 2.2.2).

Shapes: B rows, T tokens, D width, E experts.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from torchstone.model.context import Context
from torchstone.model.feedforward.router import Router
from torchstone.model.feedforward.router._scored import ScoredRouter, ScoredSpec
from torchstone.model.site import Site

__all__ = ["TopKRouter", "TopKSpec"]


class TopKSpec(ScoredSpec):
    """A softmax over experts, of which the best count."""

    paper: ClassVar[str] = "Shazeer et al. 2017, arXiv 1701.06538; Dai et al. 2024, arXiv 2401.06066"

    def build(self, site: Site, experts: int, active: int) -> Router:
        return TopKRouter(self, site, experts, active)


class TopKRouter(ScoredRouter):
    """Scores are probabilities."""

    def __init__(self, spec: TopKSpec, site: Site, experts: int, active: int) -> None:
        super().__init__(spec, experts, active)
        self.init = site.init
        self.weight = nn.Parameter(torch.empty(experts, site.width))

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        self.init(parameter, "router", generator)

    def score(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        return F.linear(x_BTD, self.weight.to(x_BTD.dtype)).softmax(-1)
