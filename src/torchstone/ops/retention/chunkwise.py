"""Retention in chunks: products within a chunk, a running sum between chunks. One chunk is the parallel form.

Shapes: B rows, H heads, T tokens, K channels of queries and keys, V of values; M chunks of C tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from torchstone.ops import at_least_float32

_GROUP = 16
"""Chunks whose running sums are one product; more go through a second level."""


def _decays(log_total_T: torch.Tensor, epoch_T: torch.Tensor | None) -> torch.Tensor:
    """(..., T, T): ``exp(total_t - total_s)`` for s <= t of one epoch, else 0. `log_total_T` (..., T): running sums."""
    T = log_total_T.shape[-1]
    seen = torch.ones(T, T, dtype=torch.bool, device=log_total_T.device).tril()
    if epoch_T is not None:
        seen = seen & (epoch_T[..., :, None] == epoch_T[..., None, :])
    # what is masked becomes exp(-inf), never inf * 0
    return (log_total_T[..., :, None] - log_total_T[..., None, :]).masked_fill(~seen, float("-inf")).exp()


def _running(new_BHMF: torch.Tensor, log_decay_BHM: torch.Tensor, fresh_BM: torch.Tensor | None) -> torch.Tensor:
    """``R_m = exp(log_decay_m) R_(m-1) + new_m``, without the first term where fresh: all R (B, H, M, F)."""
    M = new_BHMF.shape[2]
    if M > _GROUP:
        pad = -M % _GROUP
        new, log_decay = F.pad(new_BHMF, (0, 0, 0, pad)), F.pad(log_decay_BHM, (0, pad))
        new, log_decay = new.unflatten(2, (-1, _GROUP)), log_decay.unflatten(2, (-1, _GROUP))
        fresh = None if fresh_BM is None else F.pad(fresh_BM, (0, pad)).unflatten(1, (-1, _GROUP))
    else:
        new, log_decay = new_BHMF[:, :, None], log_decay_BHM[:, :, None]
        fresh = None if fresh_BM is None else fresh_BM[:, None]
    total = log_decay.cumsum(-1)
    epoch = None if fresh is None else fresh.long().cumsum(-1)[:, None]
    inside = _decays(total, epoch) @ new  # (B, H, groups, group, F)
    if M > _GROUP:
        ended = _running(inside[..., -1, :], total[..., -1], None if fresh is None else fresh.any(-1))
        before = F.pad(ended, (0, 0, 1, -1))  # what each group starts from
        share = total.exp() if epoch is None else total.exp().masked_fill(epoch > 0, 0.0)
        inside = inside + share[..., None] * before[..., None, :]
    return inside.flatten(2, 3)[:, :, :M]


def retention_chunkwise(
    q_BHTK: torch.Tensor,
    k_BHTK: torch.Tensor,
    v_BHTV: torch.Tensor,
    log_decay_BHT: torch.Tensor,
    fresh_BT: torch.Tensor | None = None,
    state_BHKV: torch.Tensor | None = None,
    chunk: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `retention_reference`, in chunks of `chunk` tokens: the cost is linear in T, and every step is a product."""
    B, H, T, K = q_BHTK.shape
    V, wide = v_BHTV.shape[-1], torch.promote_types(q_BHTK.dtype, torch.float32)
    C = min(chunk, T)
    pad, M = -T % C, -(-T // C)
    q, k, v = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (M, C)) for x in (q_BHTK, k_BHTK, v_BHTV))  # (B, H, M, C, *)
    log_decay = at_least_float32(log_decay_BHT).expand(-1, -1, T)
    total = F.pad(log_decay, (0, pad)).unflatten(2, (M, C)).cumsum(-1)  # of each chunk, up to each token
    epoch = end = fresh = None
    if fresh_BT is not None:
        epoch = F.pad(fresh_BT, (0, pad)).unflatten(1, (M, C)).long().cumsum(-1)[:, None]
        end = epoch[..., -1:]
        fresh = end[:, 0, :, 0] > 0
    # what each chunk adds, as it stands at the chunk's end; the state is what a chunk before the first one added
    left = (total[..., -1:] - total).exp()
    left = left if epoch is None else left.masked_fill(epoch != end, 0.0)
    added = (k * left[..., None]).to(k.dtype).transpose(-1, -2) @ v  # (B, H, M, K, V)
    state = q.new_zeros(B, H, K, V, dtype=wide) if state_BHKV is None else state_BHKV.to(wide)
    ends = _running(
        torch.cat([state[:, :, None], added.to(wide)], 2).flatten(3),
        F.pad(total[..., -1], (1, 0)),
        None if fresh is None else F.pad(fresh, (1, 0)),
    ).unflatten(3, (K, V))
    share = total.exp() if epoch is None else total.exp().masked_fill(epoch > 0, 0.0)
    scores = ((q @ k.transpose(-1, -2)) * _decays(total, epoch)).to(v.dtype)
    y = scores @ v + (q * share[..., None]).to(v.dtype) @ ends[:, :, :-1].to(v.dtype)
    return y.flatten(2, 3)[:, :, :T], ends[:, :, -1]
