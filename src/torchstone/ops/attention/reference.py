"""Softmax attention, the definition.

    scores = softcap(scale * q . k) + bias, -inf where the mask forbids;  out = softmax(scores) v

With a decay, q . k is the sum of `torchstone.ops.attention.decay`.

Shapes: B rows, H query heads, G key/value heads (H a multiple of G), T queries, S keys, K and V head dimensions.
"""

from __future__ import annotations

import torch

from torchstone.ops import at_least_float32, forced_reference
from torchstone.ops.attention.decay import Decay


def scores_reference(
    q_BHTK: torch.Tensor,
    k_BGSK: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    mask_BHTS: torch.Tensor | None,
    softcap: float | None,
    decay: Decay | None = None,
) -> torch.Tensor:
    """Scores (B, H, T, S) in at least float32. A boolean mask is True where attention is allowed; a float mask adds."""
    q, k = at_least_float32(q_BHTK), at_least_float32(k_BGSK)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = scale * (q @ k.transpose(-1, -2) if decay is None else _decayed(q, k, decay))
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
            # filled, not added: the gradient of a query that sees no key is 0, not NaN
            forbidden = mask_BHTS.isneginf()
            scores = scores + mask_BHTS.to(scores.dtype).masked_fill(forbidden, 0.0)
            scores = scores.masked_fill(forbidden, float("-inf"))
    return scores


def _decayed(q_BHTK: torch.Tensor, k_BHSK: torch.Tensor, decay: Decay) -> torch.Tensor:
    """Products (B, H, T, S); one query at a time is the definition, and blocks of them are equal to it."""
    T, S = q_BHTK.shape[2], k_BHSK.shape[2]
    block = 1 if forced_reference() else decay.span(q_BHTK.dtype)
    out = []
    for a in range(0, T, block):
        b = min(a + block, T)
        q, k = decay.slice(a, b, 0, S).rebased(q_BHTK[:, :, a:b], k_BHSK)
        out.append(q @ k.transpose(-1, -2))
    return torch.cat(out, 2)


def attention_reference(
    q_BHTK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSV: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask_BHTS: torch.Tensor | None = None,
    softcap: float | None = None,
    decay: Decay | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output (B, H, T, V) in the dtype of `v`, probabilities (B, H, T, S) and log-sum-exp (B, H, T).

    `causal` aligns the last query with the last key. A query that may see no key gives zeros.
    """
    scores = scores_reference(
        q_BHTK, k_BGSK, scale=scale, causal=causal, mask_BHTS=mask_BHTS, softcap=softcap, decay=decay
    )
    lse = torch.logsumexp(scores, dim=-1)
    probs = torch.softmax(scores, dim=-1)
    if mask_BHTS is not None:
        probs = torch.where(torch.isneginf(lse)[..., None], 0.0, probs)
    v = at_least_float32(v_BGSV).repeat_interleave(q_BHTK.shape[1] // v_BGSV.shape[1], dim=1)
    return (probs @ v).to(v_BGSV.dtype), probs, lse


def attention_block_max_reference(
    q_BHTK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSV: torch.Tensor,
    *,
    scale: float,
    block: int,
    first_BT: torch.Tensor | None = None,
    causal: bool = False,
    mask_BHTS: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output and probabilities as `attention_reference`, and (B, G, T, N) the largest probability that any head of a
    group gives to a key of each block; N is S / `block`, rounded up.

    `first_BT` (B|1, T): the key at which a query's blocks begin; None is 0. No gradient passes through the maxima.
    """
    out, probs, _ = attention_reference(
        q_BHTK, k_BGSK, v_BGSV, scale=scale, causal=causal, mask_BHTS=mask_BHTS, softcap=softcap
    )
    (T, S), device = probs.shape[2:], probs.device
    first_BT = torch.zeros(1, T, dtype=torch.int64, device=device) if first_BT is None else first_BT
    block_BTS = torch.div(torch.arange(S, device=device) - first_BT[..., None], block, rounding_mode="floor")
    best_BGTS = probs.detach().unflatten(1, (k_BGSK.shape[1], -1)).amax(2)
    of_block = [torch.where((block_BTS == n)[:, None], best_BGTS, 0.0).amax(-1) for n in range(-(-S // block))]
    return out, probs, torch.stack(of_block, -1)
