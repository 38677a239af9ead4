"""ZeRO, stage 1: ranks that hold the same parameters share the optimiser's state (Rajbhandari et al. 2020, arXiv
1910.02054, section 5.1).

Each parameter has an owner. Gradients are summed on all ranks, as without; the owner's optimiser alone has moments of
it and moves it, and sends it to the others. With P bytes of parameters and N ranks AdamW then keeps about 2 P / N bytes
on a rank in the place of 2 P. Whole parameters are owned, so an update is the one of a single rank, bit for bit, also
of optimisers that look at whole matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torchstone.errors import TorchstoneError
from torchstone.train.mesh import Mesh
from torchstone.train.optimizers import NamedParameter

__all__ = ["Shares", "shares"]


def shares(named: Sequence[NamedParameter], ranks: int) -> list[list[NamedParameter]]:
    """Parameters by owner: the largest first, each to the rank that has least; every share in the given order.

    Raises:
        TorchstoneError: there are more ranks than parameters.
    """
    if ranks > len(named):
        raise TorchstoneError(f"parallel.zero: {ranks} ranks cannot share {len(named)} parameters; at most one each")
    load, owner = [0] * ranks, {}
    for p in sorted(named, key=lambda p: -p.value.numel()):
        least = load.index(min(load))
        owner[p.name] = least
        load[least] += max(1, p.value.numel())
    return [[p for p in named if owner[p.name] == rank] for rank in range(ranks)]


class Shares:
    """Who owns which parameters, and what ranks send one another of them.

    Args:
        named: all parameters that train, the same on all ranks.
        mesh: the ranks.

    Attributes:
        own: this rank's.

    Raises:
        TorchstoneError: there are more ranks than parameters.
    """

    def __init__(self, named: Sequence[NamedParameter], mesh: Mesh) -> None:
        self.mesh = mesh
        self._shares = shares(named, mesh.ranks)
        self.own = self._shares[mesh.rank]

    @torch.no_grad()
    def spread(self) -> None:
        """Give every rank the parameters as their owners have them."""
        for rank, share in enumerate(self._shares):
            self.mesh.send([p.value for p in share], rank)

    def gathered(self, state: Mapping[Any, Mapping[str, Any]]) -> dict[str, dict[str, torch.Tensor]]:
        """The optimiser's state by parameter and name on the first rank, on the CPU; nothing on others. All ranks have
        to ask at once.

        Args:
            state: this rank's, by parameter.
        """
        found: dict[str, dict[str, torch.Tensor]] = {}
        for rank, share in enumerate(self._shares):
            mine = [[(key, torch.as_tensor(value)) for key, value in state.get(p.value, {}).items()] for p in share]
            shapes = [[(key, value.shape, value.dtype) for key, value in values] for values in mine]
            for number, (p, wanted) in enumerate(zip(share, self.mesh.told(shapes, rank), strict=True)):
                for at, (key, shape, dtype) in enumerate(wanted):
                    if rank == self.mesh.rank:
                        value = mine[number][at][1].to(p.value.device)
                    else:
                        value = torch.empty(shape, dtype=dtype, device=p.value.device)
                    self.mesh.send([value], rank)
                    if self.mesh.first:
                        found.setdefault(p.name, {})[key] = value.cpu()
        return found
