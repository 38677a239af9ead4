"""Retention, the definition: a sum over the past that decays, one token at a time.

Shapes: B rows, H heads, T tokens, K channels of queries and keys, V of values.
"""

from __future__ import annotations

import torch

from torchstone.ops import at_least_float32


def retention_reference(
    q_BHTK: torch.Tensor,
    k_BHTK: torch.Tensor,
    v_BHTV: torch.Tensor,
    log_decay_BHT: torch.Tensor,
    fresh_BT: torch.Tensor | None = None,
    state_BHKV: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``S_t = exp(log_decay_t) S_(t-1) + k_t v_t^T; y_t = q_t S_t``.

    Args:
        q_BHTK, k_BHTK, v_BHTV: queries, keys, values; any scale is theirs.
        log_decay_BHT: at most 0; axes of size 1 are shared.
        fresh_BT: True where a document begins: the sum starts anew with that token.
        state_BHKV: the sum before the first token; None is zero.

    Returns:
        y (B, H, T, V) in the dtype of `v_BHTV`, and the sum after the last token, in at least float32.
    """
    q, k, v, log_decay = (at_least_float32(x) for x in (q_BHTK, k_BHTK, v_BHTV, log_decay_BHT))
    B, H, T, K = q.shape
    decay_BHT = log_decay.exp().expand(B, H, T)
    if fresh_BT is not None:
        decay_BHT = decay_BHT.masked_fill(fresh_BT[:, None], 0.0)
    S = q.new_zeros(B, H, K, v.shape[-1]) if state_BHKV is None else state_BHKV.to(q.dtype)
    out = []
    for t in range(T):
        S = decay_BHT[:, :, t, None, None] * S + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None, :] @ S)[:, :, 0])
    y = torch.stack(out, 2) if out else v.new_zeros(B, H, 0, v.shape[-1])
    return y.to(v_BHTV.dtype), S
