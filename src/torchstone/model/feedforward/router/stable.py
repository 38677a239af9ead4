"""StableMoE's router (Dai et al. 2022, arXiv 2204.08396): learned first, then frozen into a table of token ids.

    s = C x    the chosen expert a counts sigmoid(s_a)
    stage 1    a = argmax s; a small router that sees the token's id alone learns it, CE(D r, a), r a vector of the id
    stage 2    a = argmax D r, a constant of the id; r and D are frozen, and only the task's loss is left

The first `distill_steps` steps of the optimiser are stage 1. Evaluation goes by the small router at all times. Balance,
in stage 1, is a loss that lowers the scores of what is chosen too often (eq. 4); with n_i tokens at expert i and
n = T / E,

    weight * sum over i of (n_i - n) / n * sum over its tokens of sigmoid(s_i)

Under torch 2.11 a training that is compiled and recomputes activations stops where stage 2 begins; 2.13 goes on.

Shapes: B rows, T tokens, D width, E experts, V token ids, C dimensions of the small router.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.model.context import Context
from torchstone.model.feedforward.router import Router, RouterSpec, Routing, ids_of
from torchstone.model.site import Site

__all__ = ["StableRouter", "StableSpec"]


class StableSpec(RouterSpec):
    """Learned first and distilled into a function of token ids, then frozen."""

    paper: ClassVar[str] = "Dai et al. 2022, arXiv 2204.08396"
    reads_ids: ClassVar[bool] = True

    distill_steps: int = Field(6000, ge=0)
    """Steps of the optimiser in stage 1; after them, choices are frozen."""
    dim: int = Field(50, ge=1)
    """C, dimensions of the small router's vectors of token ids."""
    distill: float = Field(0.3, ge=0)
    """Weight of the small router's loss."""
    balance: float = Field(0.3, ge=0)
    """Weight of the balance loss."""

    def illegal(self, experts: int, active: int) -> str | None:
        return f"active: router stable chooses one expert, not {active}" if active != 1 else None

    def build(self, site: Site, experts: int, active: int) -> Router:
        if site.vocabulary is None:
            raise TorchstoneError("router stable: has a vector for each token id, and needs a vocabulary")
        return StableRouter(self, site, site.vocabulary, experts)


class StableRouter(Router):
    """`table` (V,) is the expert of each token id in stage 2, and `frozen` whether that is reached."""

    table: torch.Tensor
    frozen: torch.Tensor

    def __init__(self, spec: StableSpec, site: Site, vocabulary: int, experts: int) -> None:
        super().__init__(experts, 1)
        self.spec, self.init = spec, site.init
        self.weight = nn.Parameter(torch.empty(experts, site.width))
        self.words = nn.Parameter(torch.empty(vocabulary, spec.dim))
        self.distilled = nn.Parameter(torch.empty(experts, spec.dim))
        self.register_buffer("table", torch.zeros(vocabulary, dtype=torch.int64))
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))

    @property
    def inactive_parameters(self) -> int:
        """Vectors of other token ids."""
        return (self.words.shape[0] - 1) * self.words.shape[1]

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        if name == "words":
            nn.init.normal_(parameter, 0.0, self.spec.dim**-0.5, generator=generator)
        else:
            nn.init.orthogonal_(parameter, gain=0.1, generator=generator)

    def initialise_buffers(self) -> None:
        """Stage 1."""
        self.table.zero_()
        self.frozen.zero_()

    def score(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        return F.linear(x_BTD, self.weight.to(x_BTD.dtype))

    def select(self, scores_BTE: torch.Tensor, ctx: Context) -> torch.Tensor:
        ids_BT = ids_of(ctx, scores_BTE.shape[0], "stable")
        live_BT = scores_BTE.argmax(-1) if self.training else self._logits(ids_BT).argmax(-1)
        return torch.where(self.frozen, self.table[ids_BT], live_BT)[..., None]

    def gate(self, scores_BTE: torch.Tensor, experts_BTK: torch.Tensor) -> torch.Tensor:
        return scores_BTE.gather(-1, experts_BTK).sigmoid()

    def losses(
        self, scores_BTE: torch.Tensor, routing: Routing, valid_BT: torch.Tensor, ctx: Context
    ) -> dict[str, torch.Tensor]:
        if not self.words.requires_grad:  # stage 2
            return {}
        counts_E = routing.counts.sum(0)
        fair = counts_E.sum().clamp(min=1) / self.E
        over_BT = ((counts_E - fair) / fair)[routing.experts[..., 0]]
        chosen_BT = scores_BTE.gather(-1, routing.experts)[..., 0].sigmoid()
        logits_BTE = self._logits(ids_of(ctx, valid_BT.shape[0], "stable"))
        miss_BT = F.cross_entropy(logits_BTE.transpose(1, 2), routing.experts[..., 0], reduction="none")
        return {
            "balance_loss": self.spec.balance * torch.where(valid_BT, over_BT * chosen_BT, 0.0).sum(),
            "distill_loss": self.spec.distill * torch.where(valid_BT, miss_BT, 0.0).sum(),
        }

    def _logits(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """The small router's scores (B, T, E)."""
        return F.linear(F.embedding(ids_BT, self.words), self.distilled)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Begin stage 2 when step number `step` (from 0) is beyond stage 1.

        What is frozen leaves the graph, so that neither weight decay nor momentum moves it. Called again, also after a
        resumption, it changes nothing.
        """
        if step < self.spec.distill_steps:
            return
        self.words.requires_grad_(False)
        self.distilled.requires_grad_(False)
        if not self.frozen:
            self.table.copy_(F.linear(self.words, self.distilled).argmax(-1))
            self.frozen.fill_(True)
