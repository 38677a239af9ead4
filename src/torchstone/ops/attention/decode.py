"""Attention of one query a row, in the two forms that decoding on a CPU needs.

The fused kernel of PyTorch converts half-precision keys tile by tile for every head, which for a single query costs
several times the reading of the cache; compiled code is faster still without it, as two loops over the cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from torchstone.ops import at_least_float32


def decode_loops(
    q_BH1K: torch.Tensor, k_BGSK: torch.Tensor, v_BGSV: torch.Tensor, *, scale: float, mask_BH1S: torch.Tensor | None
) -> torch.Tensor:
    """Output (B, H, 1, V) by sums of products, for a compiler to fuse; eager code would hold them all.

    A query that may see no key gives zeros.
    """
    (B, H, _, K), G = q_BH1K.shape, k_BGSK.shape[1]
    k, v = at_least_float32(k_BGSK), at_least_float32(v_BGSV)
    q_BGRK = at_least_float32(q_BH1K).reshape(B, G, H // G, K) * scale
    scores_BGRS = (q_BGRK[:, :, :, None] * k[:, :, None]).sum(-1)
    if mask_BH1S is not None:
        mask = mask_BH1S  # with one head, already the shape to spread over groups and their heads
        if mask.shape[1] != 1:
            mask = mask.reshape(mask.shape[0], G, H // G, mask.shape[-1])
        if mask.dtype == torch.bool:
            scores_BGRS = torch.where(mask, scores_BGRS, float("-inf"))
        else:
            scores_BGRS = scores_BGRS + mask.to(scores_BGRS.dtype)
    best = scores_BGRS.amax(-1, keepdim=True)
    weights = (scores_BGRS - torch.where(torch.isneginf(best), 0.0, best)).exp()
    mixed_BGRV = (weights[..., None] * v[:, :, None]).sum(3)
    # the best key has weight 1, so a sum below 1 means that there is none
    total = weights.sum(-1, keepdim=True).clamp(min=1.0)
    return (mixed_BGRV / total).reshape(B, H, 1, -1).to(v_BGSV.dtype)


def decode_wide(
    q_BGRK: torch.Tensor, k_BGSK: torch.Tensor, v_BGSV: torch.Tensor, mask: torch.Tensor | None, *, scale: float
) -> torch.Tensor:
    """Half-precision attention (B, G, R, V) by the float32 kernel, for R queries of a row that see the same keys."""
    q, k, v = q_BGRK.float(), k_BGSK.float(), v_BGSV.float()
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).to(v_BGSV.dtype)
