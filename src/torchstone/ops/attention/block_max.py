"""Attention that also says how much each block of keys was worth: its largest probability, one number a group of heads.

For queries t, heads h of group g and block n of B keys, counted from the first key of the query's document,

    block_max[g, t, n] = max over h in g and keys j of n of softmax(scores)[h, t, j] = max over h of exp(m - lse)

where m is the block's largest score (HySparse, arXiv 2602.03560). No gradient passes through it.

Shapes: B rows, H heads, G key/value heads, R heads a group, T queries, S keys, K and V head dimensions, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from torchstone.ops import at_least_float32

_ROWS = 256
"""Queries whose scores are held at once."""


def block_maxima(
    q_BHTK: torch.Tensor,
    k_BGSK: torch.Tensor,
    *,
    mask_of: Callable[[int, int], tuple[int, int, torch.Tensor | None]],
    scale: float,
    block: int,
    first_BT: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """(B, G, T, N) in at least float32, a few queries at a time; arguments as in `attention_block_max`."""
    T, S = q_BHTK.shape[2], k_BGSK.shape[2]
    # autocast would take the products in half precision
    with torch.no_grad(), torch.autocast(q_BHTK.device.type, enabled=False):
        q, k = at_least_float32(q_BHTK), at_least_float32(k_BGSK)
        found = []
        for a in range(0, T, _ROWS):
            b = min(a + _ROWS, T)
            first, last, mask = mask_of(a, b)
            scores = _scores(q[:, :, a:b], k[:, :, first:last], mask, scale, softcap)
            begins_BT = None if first_BT is None else first_BT[:, a:b]
            found.append(_maxima(F.pad(scores, (first, S - last), value=float("-inf")), block, begins_BT))
        return torch.cat(found, 2)


def _scores(
    q_BHTK: torch.Tensor, k_BGSK: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float | None
) -> torch.Tensor:
    """(B, G, R, T, S): the heads of a group are queries of one head, so that no key is copied."""
    (B, H, T, K), G = q_BHTK.shape, k_BGSK.shape[1]
    scores = scale * (q_BHTK.reshape(B, G, -1, K) @ k_BGSK.transpose(-1, -2)).unflatten(2, (H // G, T))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        return scores
    mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (G, H // G))
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)


def _maxima(scores_BGRTS: torch.Tensor, block: int, first_BT: torch.Tensor | None) -> torch.Tensor:
    """(B, G, T, N) from scores."""
    S, device = scores_BGRTS.shape[-1], scores_BGRTS.device
    lse = torch.logsumexp(scores_BGRTS, -1, keepdim=True)
    scores = F.pad(scores_BGRTS, (0, -S % block), value=float("-inf"))
    if first_BT is not None:  # each query's keys move to the left, until its document begins at 0
        at = first_BT[..., None] + torch.arange(scores.shape[-1], device=device)
        at_BGRTS = at[:, None, None].expand(*scores.shape[:3], -1, -1)
        moved = scores.gather(-1, at_BGRTS.clamp(max=scores.shape[-1] - 1))
        scores = torch.where(at_BGRTS < S, moved, float("-inf"))
    best = scores.unflatten(-1, (-1, block)).amax(-1)
    # a query that sees no key has -inf in both; rounding must not lift a probability above 1
    return (best - torch.where(torch.isneginf(lse), 0.0, lse)).exp().amax(2).clamp(max=1.0)
