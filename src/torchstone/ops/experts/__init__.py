"""Products over experts: tokens are sorted by expert once, and every projection is a product of groups.

    groups = group(experts_NK, E)                    # which row goes where
    x_MI = spread(x_NI, groups)                      # a row for each token and chosen expert, sorted by expert
    y_MO = grouped_product(x_MI, weight_EOI, groups)
    y_NO = collect(y_MO, gates_NK, groups)           # back to the tokens, weighed

Shapes: N tokens, E experts, K chosen by each token, M = N * K rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch

from torchstone.ops import forced_reference
from torchstone.ops.experts.grouped import gathered_product, sorted_product
from torchstone.ops.experts.reference import experts_reference, grouped_product_reference
from torchstone.ops.experts.rows import Groups, collect, group, spread

__all__ = [
    "Groups",
    "collect",
    "experts_reference",
    "gathered_product",
    "group",
    "grouped_product",
    "grouped_product_reference",
    "sorted_product",
    "spread",
]


def grouped_product(x_MI: torch.Tensor, weight_EOI: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Row m times the matrix of its expert, (M, O), and 0 where a row has none.

    One product a group, of the matrices that have rows and no others. No more rows than experts, as in decoding, on a
    device that the host would have to wait for: the chosen matrices are gathered, which needs no look at the sizes of
    the groups. (A CPU has nothing to wait for, and copies slower than it multiplies.) Under autocast the product
    is taken in its type, as a linear layer's.
    """
    kind = x_MI.device.type
    if torch.is_autocast_enabled(kind) and x_MI.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x_MI, weight_EOI = x_MI.to(dtype), weight_EOI.to(dtype)
    if forced_reference():
        return grouped_product_reference(x_MI, weight_EOI, groups.expert_M)
    if kind != "cpu" and x_MI.shape[0] <= weight_EOI.shape[0]:
        return gathered_product(x_MI, weight_EOI, groups.expert_M)
    return sorted_product(x_MI, weight_EOI, groups.ends_E)
