"""A sequence sharded over the ranks of a process group: rank i holds the i-th part of each row, all parts alike.

Segments that fit a rank are its own business. Of a larger segment each rank sends the keys and values that its heads
keep to the other ranks of the segment, so what is sent does not grow with the length of the sequence.

Shapes: B rows, H heads, T tokens of a rank, O different offsets, c kept tokens of a rank, R ranks of a segment.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as collectives

from torchstone.errors import TorchstoneError
from torchstone.ops.dilated.layout import Layout, Marks, Pattern, Plan, plan

__all__ = ["Shards"]


class Shards:
    """The ranks over which a sequence is sharded, in the order of its parts.

    Args:
        group: a process group; None is the default group. All its ranks make this object together and then run the
            same forwards and backwards.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        world = dist.group.WORLD if group is None else group
        assert world is not None, "there is no process group"
        self.group: dist.ProcessGroup = world
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        self._groups: dict[int, tuple[dist.ProcessGroup, int, int]] = {}

    def of_segment(self, ranks: int) -> tuple[dist.ProcessGroup, int, int]:
        """The group of those ranks that hold this rank's segment of `ranks` parts, its first rank, and their number."""
        if ranks not in self._groups:
            first = self.rank // ranks * ranks
            last = min(first + ranks, self.ranks)
            members = dist.get_process_group_ranks(self.group)[first:last]
            group = self.group
            if len(members) < self.ranks:
                group = dist.new_group(members, use_local_synchronization=True)
            self._groups[ranks] = group, first, last - first
        return self._groups[ranks]

    def plan(self, q: Marks, patterns: tuple[Pattern, ...], *, causal: bool) -> Plan:
        """The plan of this rank's part of rows that are one document each.

        Raises:
            TorchstoneError: a segment neither divides a rank's part nor is made of whole parts.
        """
        T = q.order.shape[1]
        for pattern in patterns:
            w = pattern.length
            if (w <= T and T % w) or (T < w < T * self.ranks and w % T):
                raise TorchstoneError(
                    f"attention.segments: {w} tokens, and each of {self.ranks} ranks holds {T}; a segment must divide "
                    "what a rank holds, be made of whole ranks' parts, or hold the sequence"
                )
        local = [pattern for pattern in patterns if pattern.length <= T or self.ranks == 1]
        made = iter(plan(q, q, local, causal=causal, aligned=True).layouts)
        layouts = tuple(next(made) if pattern in local else self._shared(pattern, q, causal) for pattern in patterns)
        return Plan(q, q, patterns, causal, layouts)

    def _shared(self, pattern: Pattern, q: Marks, causal: bool) -> Layout:
        T, r, device = q.order.shape[1], pattern.dilation, q.order.device
        group, first, count = self.of_segment(min(pattern.length // T, self.ranks))
        mine = self.rank - first
        # columns that each rank of the segment keeps, by offset: a part need not begin with a kept place
        used_RO1 = torch.tensor(pattern.used, device=device)[:, None].expand(count, -1, -1)
        begin_R11 = torch.arange(count, device=device).view(-1, 1, 1) * T
        at_ROc = (used_RO1 - begin_R11) % r + torch.arange(0, T, r, device=device)
        at_ROc = torch.where(at_ROc < T, at_ROc, -1)
        # a causal query sees its own rank's part, up to itself, and those of earlier ranks; no later one
        seen = mine + 1 if causal else count
        order_ROc = torch.where(at_ROc < 0, -1, at_ROc + begin_R11)
        k_order = order_ROc[:seen].transpose(0, 1).flatten(1)[None, :, None]  # (1, O, 1, seen * c)
        at = at_ROc[mine][None, :, None]
        q_order = order_ROc[mine][None, :, None]

        def exchange(k_BHcK: torch.Tensor, v_BHcV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            # what a rank uses comes out of the exchange, its own part too: so every rank has a gradient for it and
            # takes part in the backward exchange, the first one as well
            sizes = [k_BHcK.shape[-1], v_BHcV.shape[-1]]
            kv = torch.cat([k_BHcK, v_BHcV], -1).contiguous()
            all_RBHcE = collectives.all_gather_tensor_autograd(kv[None], 0, group)
            seen_BHsE = all_RBHcE[:seen].permute(1, 2, 0, 3, 4).flatten(2, 3)
            k, v = seen_BHsE.flatten(0, 1).split(sizes, -1)
            return k, v

        layout = Layout(at, at, exchange=exchange)
        segments = [torch.where(order < 0, none, 0) for order, none in ((q_order, -1), (k_order, -2))]
        return replace(layout, q_segment=segments[0], k_segment=segments[1], q_order=q_order, k_order=k_order)
