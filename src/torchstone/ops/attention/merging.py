"""Attention that also gives its log-sum-exp, by which results over several sets of keys become one.

Over the union of disjoint sets, softmax attention is ``sum_i share_i out_i`` with ``share = softmax(lse)``: each set
counts by its softmax denominator (Rabe and Staats 2021, arXiv 2112.05682, section 2).

Shapes: B rows, H query heads, G key/value heads, T queries, S keys, K and V head dimensions, P results to merge.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from torchstone.ops import at_least_float32, forced_reference
from torchstone.ops.attention.reference import attention_reference

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_MORE = 8
"""Channels added for the gradient of a log-sum-exp: one is needed, and the kernel's loops like multiples of eight."""


class _Flash(torch.autograd.Function):
    """The fused kernel of the CPU with a gradient through its log-sum-exp too, which its own backward leaves out.

    With scores S, probabilities P, output O: ``dS = P (dO v - rowsum(dO O) + dlse)``. The kernel takes the row sum over
    the channels of O and dO that it is given. One more channel, in which v is 0, O is -1 and dO is dlse, adds nothing
    to the first term and -dlse to the sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = _FLASH(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (q, k, v, mask, out, lse), (d_out, d_lse) = ctx.saved_tensors, grads
        K = q.shape[-1]
        q, k, v, out, d_out = (F.pad(x, (0, _MORE)) for x in (q, k, v, out, d_out))
        out[..., K], d_out[..., K] = -1.0, d_lse.to(d_out.dtype)
        dq, dk, dv = _FLASH_BACKWARD(d_out, q, k, v, out, lse, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale)
        return dq[..., :K], dk[..., :K], dv[..., :K], None, None, None


def fused_lse(q_BHTK: torch.Tensor, v_BGSV: torch.Tensor) -> bool:
    """Whether `attention_lse` of these has a kernel that holds no T x S matrix."""
    return q_BHTK.device.type == "cpu" and q_BHTK.shape[-1] == v_BGSV.shape[-1] and not forced_reference()


def attention_lse(
    q_BHTK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSV: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask_BHTS: torch.Tensor | None = None,
    lse_gradient: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention (B, H, T, V) and the log of its denominators (B, H, T), those in at least float32.

    Arguments as in `attention_reference`. `lse_gradient` False gives log-sum-exps without a gradient, which is cheaper.
    A query that may see no key gives zeros and -inf. On a CPU the fused kernel does it and holds no T x S matrix but
    the mask; where that cannot (a mask with a gradient, values of another size than keys, another device), the
    definition does.
    """
    H, T, S = q_BHTK.shape[1], q_BHTK.shape[2], k_BGSK.shape[2]
    if not fused_lse(q_BHTK, v_BGSV) or min(T, S) == 0 or (mask_BHTS is not None and mask_BHTS.requires_grad):
        out, _, lse = attention_reference(q_BHTK, k_BGSK, v_BGSV, scale=scale, causal=causal, mask_BHTS=mask_BHTS)
        return out, lse if lse_gradient else lse.detach()
    if k_BGSK.shape[1] != H:
        k_BGSK, v_BGSV = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k_BGSK, v_BGSV))
    if causal and (T != S or mask_BHTS is not None):
        # the kernel aligns the first query with the first key; we align the last with the last
        seen = torch.ones(T, S, dtype=torch.bool, device=q_BHTK.device).tril(S - T)
        if mask_BHTS is None:
            mask_BHTS = seen[None, None]
        elif mask_BHTS.dtype == torch.bool:
            mask_BHTS = mask_BHTS & seen
        else:
            mask_BHTS = mask_BHTS.masked_fill(~seen, float("-inf"))
        causal = False
    blind = None
    if mask_BHTS is not None:
        if mask_BHTS.dtype == torch.bool:
            mask_BHTS = q_BHTK.new_zeros(mask_BHTS.shape).masked_fill(~mask_BHTS, float("-inf"))
        mask_BHTS = mask_BHTS.to(q_BHTK.dtype)
        blind = mask_BHTS.amax(-1).isneginf()
    if lse_gradient and torch.is_grad_enabled():
        out, lse = _Flash.apply(q_BHTK, k_BGSK, v_BGSV, mask_BHTS, causal, scale)
    else:
        out, lse = _FLASH(q_BHTK, k_BGSK, v_BGSV, 0.0, causal, attn_mask=mask_BHTS, scale=scale)
    # the kernel's log-sum-exp of no key at all is 0
    return out, lse if blind is None else torch.where(blind, float("-inf"), lse)


def shares(lse_P: torch.Tensor) -> torch.Tensor:
    """What each of P results counts for, from log-sum-exps (P, ...): they add up to 1, and to 0 where all are -inf."""
    best = lse_P.amax(0, keepdim=True).detach()
    weight = (lse_P - torch.where(best.isneginf(), 0.0, best)).exp()
    # the best has weight 1, so a sum below 1 means that there is none
    return weight / weight.sum(0, keepdim=True).clamp(min=1.0)


def merge(
    outs: list[torch.Tensor], lses: list[torch.Tensor], *, gradient: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of sets of keys (..., V) and its log-sum-exp (...), from those over each set.

    A key that is in two sets counts twice. `gradient` False treats the shares as constants.
    """
    lse_P = torch.stack(lses)
    if not gradient:
        lse_P = lse_P.detach()
    share_P = shares(lse_P)
    out = sum(share[..., None] * at_least_float32(out) for share, out in zip(share_P, outs, strict=True))
    assert isinstance(out, torch.Tensor)
    return out.to(outs[0].dtype), torch.logsumexp(lse_P, 0)
