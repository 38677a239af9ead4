"""Softmax attention, the definition.

    scores = softcap(scale * q . k) + bias, -inf where the mask forbids;  out = softmax(scores) v

Shapes: B rows, H query heads, G key/value heads (H a multiple of G), T queries, S keys, K and V head dimensions.
"""

from __future__ import annotations

import torch

from torchstone.ops import at_least_float32


def scores_reference(
    q_BHTK: torch.Tensor,
    k_BGSK: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    mask_BHTS: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """Scores (B, H, T, S) in at least float32. A boolean mask is True where attention is allowed; a float mask adds."""
    q, k = at_least_float32(q_BHTK), at_least_float32(k_BGSK)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = scale * (q @ k.transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        T, S = scores.shape[-2:]
        allowed = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        scores = scores.masked_fill(~allowed, float("-inf"))
    if mask_BHTS is not None:
        if mask_BHTS.dtype == torch.bool:
            scores = scores.masked_fill(~mask_BHTS, float("-inf"))
        else:
            scores = scores + mask_BHTS.to(scores.dtype)
    return scores


def attention_reference(
    q_BHTK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSV: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask_BHTS: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output (B, H, T, V) in the dtype of `v`, probabilities (B, H, T, S) and log-sum-exp (B, H, T).

    `causal` aligns the last query with the last key. A query that may see no key gives zeros.
    """
    scores = scores_reference(q_BHTK, k_BGSK, scale=scale, causal=causal, mask_BHTS=mask_BHTS, softcap=softcap)
    lse = torch.logsumexp(scores, dim=-1)
    probs = torch.softmax(scores, dim=-1)
    if mask_BHTS is not None:
        probs = torch.where(torch.isneginf(lse)[..., None], 0.0, probs)
    v = at_least_float32(v_BGSV).repeat_interleave(q_BHTK.shape[1] // v_BGSV.shape[1], dim=1)
    return (probs @ v).to(v_BGSV.dtype), probs, lse
