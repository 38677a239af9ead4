"""What routers by score have in common: the best K, of some groups of experts only, and losses of balance.

With P_i the mean over tokens of expert i's share of a token's scores, c_i the tokens that chose it, and
f_i = E / (K T) c_i, which is 1 at perfect balance and has no gradient (DeepSeekMoE, arXiv 2401.06066, eqs. 12 to 17;
DeepSeek-V3, arXiv 2412.19437, eqs. 17 to 20):

    expert    weight * sum over experts of f_i P_i, over the tokens of a forward
    group     weight * sum over groups of (mean of f_i) (sum of P_i), over the tokens of a forward
    sequence  weight * sum over experts of f_i P_i, over the tokens of a row

Shapes: B rows, T tokens, E experts, K active, G groups.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from torchstone.model.context import Context
from torchstone.model.feedforward.router import Router, RouterSpec, Routing

__all__ = ["ScoredRouter", "ScoredSpec"]


class ScoredSpec(RouterSpec):
    """Takes the K experts of the highest scores."""

    best_of_group: ClassVar[int] = 1
    """How many of a group's scores are added up to say what the group is worth."""

    groups: int = Field(1, ge=1)
    """G, groups that experts are divided in, in order: the devices they would lie on."""
    keep_groups: int | None = Field(None, ge=1)
    """Of a token's experts, at most so many groups have some; None sets no limit."""
    normalise: bool = False
    """Whether the gates of a token's experts are divided by their sum."""
    scale: float = Field(1.0, gt=0)
    """Factor on gates."""
    balance: float = Field(0.01, ge=0)
    """Weight of the balance loss of experts over the tokens of a forward."""
    group_balance: float = Field(0.0, ge=0)
    """Weight of the balance loss of groups over the tokens of a forward."""
    sequence_balance: float = Field(0.0, ge=0)
    """Weight of the balance loss of experts over the tokens of each row."""

    def illegal(self, experts: int, active: int) -> str | None:
        G, kept = self.groups, self.keep_groups or self.groups
        if experts % G:
            return f"groups: {G} groups do not divide {experts} experts"
        if kept > G:
            return f"keep_groups: is {kept}, and there are {G} groups"
        if kept * experts // G < active:
            return f"keep_groups: {kept} of {G} groups have {kept * experts // G} experts, fewer than {active} active"
        if self.normalise and active == 1:
            return "normalise: the gate of one active expert would always be 1, and the router would learn nothing"
        return None


class ScoredRouter(Router):
    """Kinds say what scores are, and what of them is a share."""

    def __init__(self, spec: ScoredSpec, experts: int, active: int) -> None:
        super().__init__(experts, active)
        self.scored = spec

    def shares(self, scores_BTE: torch.Tensor) -> torch.Tensor:
        """Scores as shares (B, T, E) that add up to 1, for the losses."""
        return scores_BTE

    def select(self, scores_BTE: torch.Tensor, ctx: Context) -> torch.Tensor:
        return self.best(scores_BTE)

    def best(self, scores_BTE: torch.Tensor) -> torch.Tensor:
        """The K experts (B, T, K) of the highest scores in the groups that are kept."""
        spec = self.scored
        G, kept = spec.groups, spec.keep_groups or spec.groups
        if kept < G:
            scores_BTGe = scores_BTE.unflatten(-1, (G, -1))
            worth_BTG = scores_BTGe.topk(min(spec.best_of_group, self.E // G), -1).values.sum(-1)
            kept_BTG = torch.zeros_like(worth_BTG, dtype=torch.bool).scatter(-1, worth_BTG.topk(kept, -1).indices, True)
            scores_BTE = scores_BTGe.masked_fill(~kept_BTG[..., None], float("-inf")).flatten(-2)
        return scores_BTE.topk(self.K, -1).indices

    def gate(self, scores_BTE: torch.Tensor, experts_BTK: torch.Tensor) -> torch.Tensor:
        gates_BTK = scores_BTE.gather(-1, experts_BTK)
        if self.scored.normalise:
            gates_BTK = gates_BTK / (gates_BTK.sum(-1, keepdim=True) + 1e-20)
        return self.scored.scale * gates_BTK

    def losses(
        self, scores_BTE: torch.Tensor, routing: Routing, valid_BT: torch.Tensor, ctx: Context
    ) -> dict[str, torch.Tensor]:
        spec = self.scored
        found: dict[str, torch.Tensor] = {}
        if not (spec.balance or spec.group_balance or spec.sequence_balance):
            return found
        shares_BE = torch.where(valid_BT[..., None], self.shares(scores_BTE), 0.0).sum(1)
        tokens_B = valid_BT.sum(1).clamp(min=1)
        counts_E, shares_E, tokens = routing.counts.sum(0), shares_BE.sum(0), valid_BT.sum().clamp(min=1)
        # a mean over tokens, times their number: sums of products of sums, over tokens once
        if spec.balance:
            found["balance_loss"] = spec.balance * (counts_E * shares_E).sum() / tokens
        if spec.group_balance:
            counts_G, shares_G = (sums_E.unflatten(0, (spec.groups, -1)) for sums_E in (counts_E, shares_E))
            found["group_balance_loss"] = spec.group_balance * (counts_G.mean(1) * shares_G.sum(1)).sum() / tokens
        if spec.sequence_balance:
            rows_B = (routing.counts * shares_BE).sum(1) / tokens_B
            found["sequence_balance_loss"] = spec.sequence_balance * rows_B.sum()
        return {name: self.E / self.K * value for name, value in found.items()}
