"""Dilated attention, the definition: attention once a pattern under a mask of all pairs, mixed by denominators.

Shapes: B rows, H query heads, G key/value heads, T queries, S keys, K and V head dimensions.
"""

from __future__ import annotations

import torch

from torchstone.ops.attention import attention_reference, merge
from torchstone.ops.dilated.layout import Pattern, Plan


def allowed(plan: Plan, pattern: Pattern) -> torch.Tensor:
    """Boolean (B|1, H, T, S): both kept by the head, of one segment of one document, and the key not later."""
    w, r = pattern.length, pattern.dilation
    pairs = plan.q.segment(w)[:, :, None] == plan.k.segment(w)[:, None, :]
    if plan.causal:
        pairs = pairs & (plan.k.order[:, None, :] <= plan.q.order[:, :, None])
    by_head = [pairs & plan.q.kept(w, r, s)[:, :, None] & plan.k.kept(w, r, s)[:, None, :] for s in pattern.offsets]
    return torch.stack(by_head, 1)


def dilated_reference(
    q_BHTK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSV: torch.Tensor,
    plan: Plan,
    *,
    scale: float,
    mix_gradient: bool = False,
    bias_BHTS: torch.Tensor | None = None,
) -> torch.Tensor:
    """``sum_i share_i O_i``, share_i the part of pattern i in the sum of all softmax denominators (B, H, T, V).

    A key that two patterns keep for a query counts twice. A query that no pattern keeps (padding) gives zeros.
    """
    outs, lses = [], []
    for pattern in plan.patterns:
        mask = allowed(plan, pattern)
        if bias_BHTS is not None:
            mask = torch.where(mask, bias_BHTS, float("-inf"))
        out, _, lse = attention_reference(q_BHTK, k_BGSK, v_BGSV, scale=scale, mask_BHTS=mask)
        outs.append(out)
        lses.append(lse)
    return merge(outs, lses, gradient=mix_gradient)[0]
