"""Rows of tokens in the order of their experts, and back. Both ways are gathers, and each is the other's gradient, so
that sums are taken in one order on any device.

Shapes: N tokens, E experts, K chosen by each token, M = N * K rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Groups:
    """Where rows stand once they are sorted by expert.

    Attributes:
        order_M: the choice, n * K + k, that row m is of.
        place_M: the row of choice n * K + k.
        expert_M: the expert of row m; E where it has none, which is after all others.
        ends_E: the row after the last of each expert, int32.
        active: K.
    """

    order_M: torch.Tensor
    place_M: torch.Tensor
    expert_M: torch.Tensor
    ends_E: torch.Tensor
    active: int


def group(experts_NK: torch.Tensor, experts: int) -> Groups:
    """Sort choices by expert, those of one expert in the order of tokens. The number `experts` means none."""
    N, K = experts_NK.shape
    expert_M, order_M = experts_NK.flatten().sort(stable=True)
    numbers_M = torch.arange(N * K, device=order_M.device)
    place_M = torch.empty_like(order_M).scatter(0, order_M, numbers_M)
    of_E = torch.arange(experts, device=order_M.device, dtype=expert_M.dtype)
    ends_E = torch.searchsorted(expert_M, of_E, right=True, out_int32=True)
    return Groups(order_M, place_M, expert_M, ends_E, K)


def spread(x_ND: torch.Tensor, groups: Groups) -> torch.Tensor:
    """A row for each choice, sorted by expert: (M, D)."""
    return _Spread.apply(x_ND, groups.order_M, groups.place_M, groups.active)


def collect(y_MD: torch.Tensor, gates_NK: torch.Tensor, groups: Groups) -> torch.Tensor:
    """The sum (N, D) of each token's rows, each times its gate."""
    gates_M = _Spread.apply(gates_NK.reshape(-1, 1), groups.order_M, groups.place_M, 1)
    return _Collect.apply(y_MD * gates_M.to(y_MD.dtype), groups.order_M, groups.place_M, groups.active)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, order_M, place_M, K):
        ctx.save_for_backward(order_M, place_M)
        ctx.K = K
        return x_ND.index_select(0, order_M // K)

    @staticmethod
    def backward(ctx, grad):
        return _Collect.apply(grad, *ctx.saved_tensors, ctx.K), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_MD, order_M, place_M, K):
        ctx.save_for_backward(order_M, place_M)
        ctx.K = K
        return y_MD.index_select(0, place_M).unflatten(0, (-1, K)).sum(1)

    @staticmethod
    def backward(ctx, grad):
        return _Spread.apply(grad, *ctx.saved_tensors, ctx.K), None, None, None
