"""Routing replay (Ma et al. 2025, arXiv 2510.11370): the experts that tokens were sent to while an answer was written
are those that they are sent to when it is trained on.

Which experts count is replayed, never how much: gates are made of the live scores of the recorded experts, so that the
router learns, and scores of others get no gradient. They stand in the order of these scores, best first, as live ones
do: gshard's balance loss is about first choices. Where the live choice is the recorded one, nothing changes, to the
bit. A token without a record (-1) goes where the router sends it.

Shapes: R rows, T tokens, L routed layers, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.model.routed import routed_layers
from torchstone.model.taps import Taps

__all__ = ["Replay"]


class Replay:
    """Taps that put recorded choices in the place of the live ones, in one forward and its recomputation.

    Args:
        model: a decoder with routed layers.
        routes_RTLK: experts of each token and layer, in any order; rows of -1 where there is no record. K is that of
            the layer that takes most experts, -1 fills the rows of one that takes fewer.
        valid_RT: which tokens count.

    Raises:
        TorchstoneError: the model has no routed layers or another number of them, or a record is none: an expert that
            is not there, one twice, other numbers of rows, tokens or experts a token.
    """

    def __init__(self, model: nn.Module, routes_RTLK: torch.Tensor, valid_RT: torch.Tensor) -> None:
        routers = routed_layers(model)
        if not routers:
            raise TorchstoneError("routes: no layer of this model has a router")
        wanted = (*valid_RT.shape, len(routers))
        if routes_RTLK.dim() != 4 or tuple(routes_RTLK.shape[:3]) != wanted:
            raise TorchstoneError(
                f"routes: rows, tokens and routed layers are {tuple(routes_RTLK.shape[:3])}, the model's are {wanted}"
            )
        widest = max(routers, key=lambda path: routers[path].K)
        if routes_RTLK.shape[-1] != routers[widest].K:
            recorded = routes_RTLK.shape[-1]
            raise TorchstoneError(
                f"routes: {widest} takes {routers[widest].K} experts a token, {recorded} are recorded"
            )
        self.routes_RTLK, self.valid_RT = routes_RTLK.long().sort(-1).values, valid_RT
        for number, (path, router) in enumerate(routers.items()):
            self._check(self.routes_RTLK[:, :, number], path, router.E, router.K)
        self.changed = {path: torch.zeros_like(valid_RT) for path in routers}
        """Of each layer, tokens (R, T) whose live choice was another."""
        self._scores: dict[str, torch.Tensor] = {}
        replace = {f"{path}.scores": self._look(path) for path in routers}
        replace |= {
            f"{path}.experts": self._replace(number, path, routers[path].K) for number, path in enumerate(routers)
        }
        self.taps = Taps(replace=replace)

    @staticmethod
    def _check(routes_RTK: torch.Tensor, path: str, experts: int, active: int) -> None:
        if (routes_RTK[..., :-active] >= 0).any():  # what fills a row is in front, in the order of numbers
            raise TorchstoneError(f"routes: {path} takes {active} experts a token, more are recorded")
        routes_RTK = routes_RTK[..., -active:]
        missing_RT = (routes_RTK < 0).all(-1)
        there_NK = routes_RTK[~missing_RT]
        if (there_NK < 0).any() or (there_NK >= experts).any():
            raise TorchstoneError(f"routes: a recorded expert of {path} is not among its {experts}")
        if (there_NK[:, 1:] == there_NK[:, :-1]).any():
            raise TorchstoneError(f"routes: an expert of {path} is recorded twice for one token")

    def _look(self, path: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def look(scores_RTE: torch.Tensor) -> torch.Tensor:
            self._scores[path] = scores_RTE.detach()
            return scores_RTE

        return look

    def _replace(self, number: int, path: str, active: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def replace(live_RTK: torch.Tensor) -> torch.Tensor:
            given_RTK = self.routes_RTLK[:, :, number, -active:]
            other_RT = (live_RTK.sort(-1).values != given_RTK).any(-1) & (given_RTK[..., 0] >= 0)
            self.changed[path] = other_RT & self.valid_RT  # the same when it is made again in the backward pass
            given_RTK = given_RTK.clamp(min=0)
            order_RTK = self._scores.pop(path).gather(-1, given_RTK).argsort(dim=-1, descending=True, stable=True)
            return torch.where(other_RT[..., None], given_RTK.gather(-1, order_RTK), live_RTK)

        return replace

    def metrics(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """After the forward: share of choices that were changed, of tokens with one that was, and of tokens that lack a
        record in some layer."""
        tokens, missing_RT = self.valid_RT.sum(), (self.routes_RTLK < 0).all(-1).any(-1) & self.valid_RT
        changed_LRT = torch.stack([*self.changed.values()])
        return {
            "routes_changed": (changed_LRT.sum(), tokens * len(changed_LRT)),
            "tokens_rerouted": (changed_LRT.any(0).sum(), tokens),
            "routes_missing": (missing_RT.sum(), tokens),
        }
