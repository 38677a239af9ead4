"""Router: which experts a token goes to, and what each counts.

    routing = router(x_BTD, ctx)

Every kind fills in the same three steps: `score` says how much each expert suits a token, `select` chooses K of them,
and `gate` weighs the chosen by their scores. Choosing passes no gradient. A tap that replaces "experts" therefore
replays choices, while gates go on being made of the live scores. Scores are taken in at least float32, also under
autocast: a choice that is lost to rounding is another expert.

Shapes: B rows, T tokens, D width, E experts, K of them active.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.model.context import Context
from torchstone.model.site import Site
from torchstone.ops import at_least_float32
from torchstone.spec import PartSpec, lazy_parts

__all__ = ["Router", "RouterSpec", "Routing"]

__getattr__ = lazy_parts(__name__)


class RouterSpec(PartSpec):
    """A way to choose experts."""

    family: ClassVar[str] = "router"
    default_kind: ClassVar[str] = "topk"
    reads_ids: ClassVar[bool] = False
    """Whether it goes by token ids."""

    def illegal(self, experts: int, active: int) -> str | None:
        """Why it cannot choose `active` of that many experts, naming a field; None if it can."""
        return None

    def build(self, site: Site, experts: int, active: int) -> Router:
        """The module."""
        raise NotImplementedError


@dataclass(frozen=True)
class Routing:
    """What a router gives.

    Attributes:
        experts: (B, T, K), no expert twice for one token.
        gates: what each counts (B, T, K), in at least float32.
        counts: valid tokens of each row that chose each expert, (B, E).
        losses: sums over valid tokens by name, in training.
    """

    experts: torch.Tensor
    gates: torch.Tensor
    counts: torch.Tensor
    losses: dict[str, torch.Tensor] = field(default_factory=dict)


class Router(nn.Module):
    """What a router kind builds.

    A router may have ``before_step(step)`` and ``after_step(step, sums)``, which the engine calls around each step of
    the optimiser: see `torchstone.train.engine`.
    """

    def __init__(self, experts: int, active: int) -> None:
        super().__init__()
        self.E, self.K = experts, active

    def score(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        """How much each expert suits each token, (B, T, E)."""
        raise NotImplementedError

    def select(self, scores_BTE: torch.Tensor, ctx: Context) -> torch.Tensor:
        """K experts for each token, (B, T, K); `scores_BTE` has no gradient."""
        raise NotImplementedError

    def gate(self, scores_BTE: torch.Tensor, experts_BTK: torch.Tensor) -> torch.Tensor:
        """What each of these experts counts, (B, T, K)."""
        raise NotImplementedError

    def losses(
        self, scores_BTE: torch.Tensor, routing: Routing, valid_BT: torch.Tensor, ctx: Context
    ) -> dict[str, torch.Tensor]:
        """Sums over valid tokens, weighted, with names that end in ``_loss``."""
        return {}

    def forward(self, x_BTD: torch.Tensor, ctx: Context) -> Routing:
        """Choices and gates for each token."""
        B, T, _ = x_BTD.shape
        with torch.autocast(x_BTD.device.type, enabled=False):
            scores_BTE = ctx.tap("scores", self.score(at_least_float32(x_BTD), ctx))
            experts_BTK = ctx.tap("experts", self.select(scores_BTE.detach(), ctx))
            gates_BTK = ctx.tap("gates", self.gate(scores_BTE, experts_BTK))
            valid_BT = torch.ones(B, T, dtype=torch.bool, device=x_BTD.device)
            valid_BT = valid_BT if ctx.q.valid is None else valid_BT & ctx.q.valid
            ones_BTK = valid_BT[..., None].to(scores_BTE.dtype).expand_as(gates_BTK)
            counts_BE = ones_BTK.new_zeros(B, self.E).scatter_add(1, experts_BTK.flatten(1), ones_BTK.flatten(1))
            routing = Routing(experts_BTK, gates_BTK, counts_BE)
            if not self.training:
                return routing
            losses = self.losses(scores_BTE, routing, valid_BT, ctx)
        return Routing(experts_BTK, gates_BTK, counts_BE, losses)


def ids_of(ctx: Context, rows: int, kind: str) -> torch.Tensor:
    """Token ids (B, T).

    Raises:
        TorchstoneError: the forward has none.
    """
    if ctx.q.ids is None:
        raise TorchstoneError(f"router {kind}: chooses by token ids, and this forward has none")
    return ctx.q.ids.expand(rows, -1)
