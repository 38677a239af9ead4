"""Dilated attention: softmax attention on sparse subsets of segments, several patterns mixed by their denominators."""

from __future__ import annotations

import torch

from torchstone.ops import forced_reference
from torchstone.ops.dilated.layout import Marks, Pattern, Plan, plan
from torchstone.ops.dilated.reference import dilated_reference
from torchstone.ops.dilated.shards import Shards
from torchstone.ops.dilated.sparse import Bias, dilated_sparse

__all__ = ["Bias", "Marks", "Pattern", "Plan", "Shards", "dilated", "dilated_reference", "dilated_sparse", "plan"]


def dilated(
    q_BHTK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSV: torch.Tensor,
    plan: Plan,
    *,
    scale: float,
    mix_gradient: bool = False,
    bias: Bias | None = None,
) -> torch.Tensor:
    """Dilated attention (B, H, T, V) in the dtype of the values.

    Args:
        q_BHTK, k_BGSK, v_BGSV: queries, keys, values; rotated where positions are rotations.
        plan: which tokens each pattern keeps, from `plan`.
        scale: factor on scores.
        mix_gradient: whether gradients flow through the shares of the patterns.
        bias: score bias of items as a function of rows, heads and columns; the plan then needs ``flags=False``.
    """
    if forced_reference() and all(layout.exchange is None for layout in plan.layouts):
        bias_BHTS = None if bias is None else _all_pairs(bias, q_BHTK, k_BGSK)
        return dilated_reference(
            q_BHTK, k_BGSK, v_BGSV, plan, scale=scale, mix_gradient=mix_gradient, bias_BHTS=bias_BHTS
        )
    return dilated_sparse(q_BHTK, k_BGSK, v_BGSV, plan, scale=scale, mix_gradient=mix_gradient, bias=bias)


def _all_pairs(bias: Bias, q_BHTK: torch.Tensor, k_BGSK: torch.Tensor) -> torch.Tensor:
    """The bias (B, H, T, S) of every query and key."""
    (B, H, T, _), S, device = q_BHTK.shape, k_BGSK.shape[2], q_BHTK.device
    row = torch.arange(B, device=device).repeat_interleave(H)
    head = torch.arange(H, device=device).repeat(B)
    columns = (torch.arange(count, device=device).expand(B * H, -1) for count in (T, S))
    return bias(row, head, *columns).unflatten(0, (B, H))
