"""X-MoE's router: the cosine to each expert in a space of few dimensions (Chi et al. 2022, arXiv 2204.09179).

    p = W x    s_i = <p, e_i> / (|p| |e_i|)    gates = softmax(s / tau), or sigmoid(s_i / tau), tau learned

A dot product with the stream's vector would pull all vectors into the space that the experts' vectors span; the cosine
gives no gradient along p or e_i, and the projection leaves that space small. The balance loss takes its shares at a
temperature of its own, so that tau cannot satisfy it.

Shapes: B rows, T tokens, D width, E experts, C dimensions.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from torchstone.model.context import Context
from torchstone.model.feedforward.router import Router
from torchstone.model.feedforward.router._scored import ScoredRouter, ScoredSpec
from torchstone.model.site import Site

__all__ = ["CosineRouter", "CosineSpec"]

_EPS = 1e-4


class CosineSpec(ScoredSpec):
    """Cosines in a space of few dimensions, over a learned temperature."""

    paper: ClassVar[str] = "Chi et al. 2022, arXiv 2204.09179"

    dim: int | None = Field(None, ge=1)
    """C, dimensions of the space; None means half as many as experts, and at least 2."""
    gating: Literal["softmax", "sigmoid"] = "softmax"
    """What makes gates of cosines."""
    temperature: float | None = Field(None, gt=0)
    """tau at the start; None means 0.3 for softmax and 0.07 for sigmoid."""
    balance_temperature: float = Field(0.07, gt=0)
    """Temperature of the shares in balance losses."""

    def build(self, site: Site, experts: int, active: int) -> Router:
        return CosineRouter(self, site, experts, active)


class CosineRouter(ScoredRouter):
    """Scores are cosines."""

    def __init__(self, spec: CosineSpec, site: Site, experts: int, active: int) -> None:
        super().__init__(spec, experts, active)
        self.spec, self.init = spec, site.init
        C = spec.dim or max(2, experts // 2)
        self.down = nn.Parameter(torch.empty(C, site.width))
        self.weight = nn.Parameter(torch.empty(experts, C))
        self.log_temperature = nn.Parameter(torch.empty(()))  # tau must stay positive

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        if name == "log_temperature":
            usual = 0.3 if self.spec.gating == "softmax" else 0.07
            parameter.fill_(math.log(self.spec.temperature or usual))
        elif name == "weight":
            nn.init.orthogonal_(parameter, gain=0.32, generator=generator)
        else:
            self.init(parameter, "router", generator)

    def score(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        p_BTC = F.linear(x_BTD, self.down.to(x_BTD.dtype))
        e_EC = F.normalize(self.weight.to(x_BTD.dtype), dim=-1, eps=_EPS)
        return F.linear(F.normalize(p_BTC, dim=-1, eps=_EPS), e_EC)

    def shares(self, scores_BTE: torch.Tensor) -> torch.Tensor:
        return (scores_BTE / self.spec.balance_temperature).softmax(-1)

    def gate(self, scores_BTE: torch.Tensor, experts_BTK: torch.Tensor) -> torch.Tensor:
        z_BTE = scores_BTE / self.log_temperature.to(scores_BTE.dtype).exp()
        return super().gate(z_BTE.softmax(-1) if self.spec.gating == "softmax" else z_BTE.sigmoid(), experts_BTK)
