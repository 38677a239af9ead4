"""Products over experts, the definitions: a loop over experts, each over all rows, in at least float32.

Shapes: N tokens, E experts, K chosen by each token, M rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from torchstone.ops import at_least_float32


def grouped_product_reference(x_MI: torch.Tensor, weight_EOI: torch.Tensor, expert_M: torch.Tensor) -> torch.Tensor:
    """Row m times the matrix of expert_M[m]; 0 where that is no expert."""
    x, w = at_least_float32(x_MI), at_least_float32(weight_EOI)
    y_MO = x.new_zeros(x.shape[0], w.shape[1])
    for e in range(w.shape[0]):
        y_MO = y_MO + torch.where((expert_M == e)[:, None], x @ w[e].T, 0.0)
    return y_MO.to(x_MI.dtype)


def experts_reference(
    x_NI: torch.Tensor,
    experts_NK: torch.Tensor,
    gates_NK: torch.Tensor,
    networks: list[Callable[[torch.Tensor], torch.Tensor]],
) -> torch.Tensor:
    """sum over k of gates[n, k] * networks[experts[n, k]](x[n]), (N, O): what a layer of experts is.

    A choice from len(networks) on is none and counts 0.
    """
    total: torch.Tensor | float = 0.0
    for e, network in enumerate(networks):
        weight_N = torch.where(experts_NK == e, gates_NK, 0.0).sum(-1)
        total = total + weight_N[:, None] * network(x_NI)
    assert isinstance(total, torch.Tensor)
    return total
