"""Softmax attention: `attention` for one mask, `blockwise` where a T x S mask would be too large to hold,
`attention_block_max` where a later layer wants to know which blocks of keys mattered, `attention_lse` and `merge` where
results over several sets of keys become one, `attention_probs` where somebody wants the probabilities."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from torchstone.ops import forced_reference
from torchstone.ops.attention.block_max import block_maxima
from torchstone.ops.attention.decay import Decay
from torchstone.ops.attention.decode import decode_loops, decode_wide
from torchstone.ops.attention.merging import attention_lse, fused_lse, merge, shares
from torchstone.ops.attention.probs import attention_probs, weighted_values
from torchstone.ops.attention.reference import attention_block_max_reference, attention_reference, scores_reference

__all__ = [
    "Decay",
    "attention",
    "attention_block_max",
    "attention_block_max_reference",
    "attention_lse",
    "attention_probs",
    "attention_reference",
    "blockwise",
    "fused_lse",
    "merge",
    "scores_reference",
    "shares",
    "weighted_values",
]


def attention(
    q_BHTK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSV: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask_BHTS: torch.Tensor | None = None,
    softcap: float | None = None,
    decay: Decay | None = None,
) -> torch.Tensor:
    """Softmax attention (B, H, T, V), by scaled_dot_product_attention where that can say it.

    Arguments as in `attention_reference`; the mask's B and H may be 1. A soft-cap has no fused kernel on the CPU and
    takes the definition. With a decay, more queries than one product may hold go block by block.
    """
    if softcap is not None or forced_reference():
        return attention_reference(
            q_BHTK, k_BGSK, v_BGSV, scale=scale, causal=causal, mask_BHTS=mask_BHTS, softcap=softcap, decay=decay
        )[0]
    if decay is not None:
        if q_BHTK.shape[2] > decay.span(k_BGSK.dtype):
            mask_of = _in_blocks(causal, mask_BHTS, q_BHTK, k_BGSK)
            return blockwise(q_BHTK, k_BGSK, v_BGSV, mask_of=mask_of, scale=scale, decay=decay)
        q_BHTK, k_BGSK = decay.rebased(q_BHTK, k_BGSK)
    (B, H, T, K), (G, S) = q_BHTK.shape, k_BGSK.shape[1:3]
    if causal and T != S:  # SDPA aligns `is_causal` with the first key; we align the last query with the last key
        mask_BHTS = torch.ones(T, S, dtype=torch.bool, device=q_BHTK.device).tril(S - T)[None, None]
        causal = False
    on_cpu = q_BHTK.device.type == "cpu"
    if T == 1 and on_cpu and torch.compiler.is_compiling():
        return decode_loops(q_BHTK, k_BGSK, v_BGSV, scale=scale, mask_BH1S=mask_BHTS)
    wide = T == 1 and on_cpu and q_BHTK.dtype in (torch.bfloat16, torch.float16)
    if mask_BHTS is not None and mask_BHTS.dtype != torch.bool:
        mask_BHTS = mask_BHTS.to(torch.float32 if wide else q_BHTK.dtype)
    if T == 1 and (wide or H != G):
        # one query per row: the heads of a group become the queries of one head, and no key is copied
        q_BGRK = q_BHTK.reshape(B, G, H // G, K)
        if mask_BHTS is not None and mask_BHTS.shape[1] != 1:
            mask_BHTS = mask_BHTS.reshape(mask_BHTS.shape[0], G, H // G, S)
        kernel = decode_wide if wide else F.scaled_dot_product_attention
        return kernel(q_BGRK, k_BGSK, v_BGSV, mask_BHTS, scale=scale).reshape(B, H, 1, -1)
    V = v_BGSV.shape[-1]
    if K != V:  # fused kernels take heads of one size, others hold all scores: channels of zeros change no result
        q_BHTK, k_BGSK = F.pad(q_BHTK, (0, max(0, V - K))), F.pad(k_BGSK, (0, max(0, V - K)))
        v_BGSV = F.pad(v_BGSV, (0, max(0, K - V)))
    if H != G:
        k_BGSK = k_BGSK.repeat_interleave(H // G, dim=1)
        v_BGSV = v_BGSV.repeat_interleave(H // G, dim=1)
    y_BHTV = F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSV, mask_BHTS, is_causal=causal, scale=scale)
    return y_BHTV[..., :V]


def blockwise(
    q_BHTK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSV: torch.Tensor,
    *,
    mask_of: Callable[[int, int], tuple[int, int, torch.Tensor | None]],
    scale: float,
    softcap: float | None = None,
    block: int = 1024,
    decay: Decay | None = None,
) -> torch.Tensor:
    """Attention over blocks of queries, so that no T x S matrix is ever held, forwards or backwards.

    `mask_of(a, b)` gives, for queries a..b, the first and last key (exclusive) that any of them sees and the mask
    (B|1, H|1, b - a, last - first) over those keys. Each block sees all its keys at once: nothing needs merging, and
    in the backward pass a block's mask is made again instead of kept.
    """

    def one(q_BHtK: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: int, b: int) -> torch.Tensor:
        first, last, mask = mask_of(a, b)
        k, v = k[:, :, first:last], v[:, :, first:last]
        falls = None if decay is None else decay.slice(a, b, first, last)
        return attention(q_BHtK, k, v, scale=scale, mask_BHTS=mask, softcap=softcap, decay=falls)

    outs = []
    block = block if decay is None else min(block, decay.span(k_BGSK.dtype))
    for a in range(0, q_BHTK.shape[2], block):
        b = min(a + block, q_BHTK.shape[2])
        q = q_BHTK[:, :, a:b]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            outs.append(checkpoint(one, q, k_BGSK, v_BGSV, a, b, use_reentrant=False, preserve_rng_state=False))
        else:
            outs.append(one(q, k_BGSK, v_BGSV, a, b))
    return torch.cat(outs, dim=2)


def attention_block_max(
    q_BHTK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSV: torch.Tensor,
    *,
    scale: float,
    block: int,
    first_BT: torch.Tensor | None = None,
    causal: bool = False,
    mask_BHTS: torch.Tensor | None = None,
    mask_of: Callable[[int, int], tuple[int, int, torch.Tensor | None]] | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (B, H, T, V) and the largest probability of each block of keys (B, G, T, N), in at least float32.

    Arguments as in `attention_block_max_reference`; with `mask_of` as in `blockwise`, no T x S matrix is held. The
    output is that of the fast kernels; scores are made a second time for the maxima, a few queries at a time.
    """
    if mask_of is not None:
        out = blockwise(q_BHTK, k_BGSK, v_BGSV, mask_of=mask_of, scale=scale, softcap=softcap)
    elif forced_reference():
        out, _, found = attention_block_max_reference(
            q_BHTK, k_BGSK, v_BGSV, scale=scale, block=block, first_BT=first_BT, causal=causal, mask_BHTS=mask_BHTS,
            softcap=softcap,
        )  # fmt: skip
        return out, found
    else:
        out = attention(q_BHTK, k_BGSK, v_BGSV, scale=scale, causal=causal, mask_BHTS=mask_BHTS, softcap=softcap)
        mask_of = _in_blocks(causal, mask_BHTS, q_BHTK, k_BGSK)
    return out, block_maxima(
        q_BHTK, k_BGSK, mask_of=mask_of, scale=scale, block=block, first_BT=first_BT, softcap=softcap
    )


def _in_blocks(
    causal: bool, mask_BHTS: torch.Tensor | None, q_BHTK: torch.Tensor, k_BGSK: torch.Tensor
) -> Callable[[int, int], tuple[int, int, torch.Tensor | None]]:
    """A mask as `blockwise` takes it."""
    T, S = q_BHTK.shape[2], k_BGSK.shape[2]

    def mask_of(a: int, b: int) -> tuple[int, int, torch.Tensor | None]:
        if not causal:
            return 0, S, None if mask_BHTS is None else mask_BHTS[:, :, a:b]
        last = S - T + b
        seen = torch.ones(b - a, last, dtype=torch.bool, device=q_BHTK.device).tril(last - (b - a))
        return 0, last, seen[None, None]

    return mask_of
