"""DeepSeek-V3's router: experts are balanced by a bias on choices, not by a loss (arXiv 2412.19437, section 2.1.2; Wang
et al. 2024, arXiv 2408.15664).

    s = sigmoid(W x)    chosen: the best K of s + b    gates = scale * s_i / (sum of the chosen s)
    after each step of the optimiser: b_i += update_rate * sign(mean count - count of i)

The bias never enters a gate and has no gradient. Counts are those of all micro-batches and ranks of the step. With
groups, a group is worth the sum of its two best s + b.

Shapes: B rows, T tokens, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from torchstone.model.context import Context
from torchstone.model.feedforward.router import Router
from torchstone.model.feedforward.router._scored import ScoredRouter, ScoredSpec
from torchstone.model.site import Site

__all__ = ["SigmoidBiasRouter", "SigmoidBiasSpec"]


class SigmoidBiasSpec(ScoredSpec):
    """A sigmoid for each expert; a bias on choices, moved after each step, balances them."""

    paper: ClassVar[str] = "DeepSeek-AI 2024, arXiv 2412.19437; Wang et al. 2024, arXiv 2408.15664"
    best_of_group: ClassVar[int] = 2

    normalise: bool = True
    """Whether the gates of a token's experts are divided by their sum."""
    balance: float = Field(0.0, ge=0)
    """Weight of the balance loss of experts over the tokens of a forward."""
    sequence_balance: float = Field(1e-4, ge=0)
    """Weight of the balance loss of experts over the tokens of each row."""
    update_rate: float = Field(1e-3, ge=0)
    """How far the bias of an expert moves after each step."""
    update_steps: int | None = Field(None, ge=0)
    """Steps after which the bias stays as it is; None moves it to the end."""

    def build(self, site: Site, experts: int, active: int) -> Router:
        return SigmoidBiasRouter(self, site, experts, active)


class SigmoidBiasRouter(ScoredRouter):
    """Scores are independent, each between 0 and 1. `bias` is a float32 buffer, whatever the weights are."""

    bias: torch.Tensor

    def __init__(self, spec: SigmoidBiasSpec, site: Site, experts: int, active: int) -> None:
        super().__init__(spec, experts, active)
        self.spec, self.init, self.name = spec, site.init, f"load.{site.group}"
        self.weight = nn.Parameter(torch.empty(experts, site.width))
        self.register_buffer("bias", torch.zeros(experts, dtype=torch.float32))

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        self.init(parameter, "router", generator)

    def initialise_buffers(self) -> None:
        """No expert is preferred at first."""
        self.bias.zero_()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        bias = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != torch.float32:  # its steps are smaller than what bfloat16 tells apart
            self.bias = bias.to(self.bias.device)
        return self

    def score(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        return F.linear(x_BTD, self.weight.to(x_BTD.dtype)).sigmoid()

    def shares(self, scores_BTE: torch.Tensor) -> torch.Tensor:
        return scores_BTE / (scores_BTE.sum(-1, keepdim=True) + 1e-20)

    def select(self, scores_BTE: torch.Tensor, ctx: Context) -> torch.Tensor:
        return self.best(scores_BTE + self.bias)

    @torch.no_grad()
    def after_step(self, step: int, sums: Mapping[str, torch.Tensor]) -> None:
        """Move the bias by the counts of step number `step` (from 0)."""
        steps = self.spec.update_steps
        if self.weight.requires_grad and (steps is None or step < steps):
            load_E = sums[self.name]
            self.bias += self.spec.update_rate * torch.sign(load_E.mean() - load_E).to(self.bias)
