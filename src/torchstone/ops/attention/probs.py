"""Attention whose probabilities somebody wants: they exist, so what is spared is passes over them.

Shapes: B rows, H query heads, G key/value heads (H a multiple of G), T queries, S keys, K and V head dimensions.
"""

from __future__ import annotations

import torch

from torchstone.ops import at_least_float32, forced_reference
from torchstone.ops.attention.decay import Decay
from torchstone.ops.attention.reference import attention_reference

__all__ = ["attention_probs", "weighted_values"]


def attention_probs(
    q_BHTK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSV: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask_BHTS: torch.Tensor | None = None,
    softcap: float | None = None,
    decay: Decay | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, T, V) in the dtype of `v` and probabilities (B, H, T, S) in at least float32.

    Arguments as in `attention_reference`; a soft-cap or a decay takes it.
    """
    if softcap is not None or decay is not None or forced_reference():
        return attention_reference(
            q_BHTK, k_BGSK, v_BGSV, scale=scale, causal=causal, mask_BHTS=mask_BHTS, softcap=softcap, decay=decay
        )[:2]
    (B, H, T, K), (G, S), blind = q_BHTK.shape, k_BGSK.shape[1:3], None
    q, k = at_least_float32(q_BHTK), at_least_float32(k_BGSK)
    # the heads of a group are more queries of one head: no key is copied; and it is queries that are scaled, not scores
    scores_BHTS = ((scale * q).reshape(B, G, -1, K) @ k.transpose(-1, -2)).reshape(B, H, T, S)
    forbidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1) if causal else None
    if mask_BHTS is not None:
        hidden = ~mask_BHTS if mask_BHTS.dtype == torch.bool else mask_BHTS.isneginf()
        if mask_BHTS.dtype != torch.bool:
            scores_BHTS = scores_BHTS + mask_BHTS.to(scores_BHTS.dtype).masked_fill(hidden, 0.0)
        forbidden = hidden if forbidden is None else hidden | forbidden
        blind = forbidden.all(-1, keepdim=True)
    if forbidden is not None:
        scores_BHTS = scores_BHTS.masked_fill(forbidden, float("-inf"))
    probs_BHTS = scores_BHTS.softmax(-1)
    if blind is not None:
        probs_BHTS = probs_BHTS.masked_fill(blind, 0.0)
    return weighted_values(probs_BHTS, at_least_float32(v_BGSV)).to(v_BGSV.dtype), probs_BHTS


def weighted_values(probs_BHTS: torch.Tensor, v_BGSV: torch.Tensor) -> torch.Tensor:
    """Sums (B, H, T, V) of values by probabilities; no value is copied for the heads of a group."""
    (B, H, T, S), (G, V) = probs_BHTS.shape, (v_BGSV.shape[1], v_BGSV.shape[3])
    return (probs_BHTS.reshape(B, G, -1, S) @ v_BGSV).reshape(B, H, T, V)
