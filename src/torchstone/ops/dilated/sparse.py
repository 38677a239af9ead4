"""Dilated attention over the kept tokens alone: cost and memory are linear in the length of the sequence.

Shapes: B rows, H query heads, G key/value heads, T queries, S keys, K and V head dimensions; O different offsets, n
blocks, c queries and W keys of a block; Z = B H n items, each a block of one head; N = B T H.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from torchstone.ops import at_least_float32
from torchstone.ops.attention import attention_lse, fused_lse, shares
from torchstone.ops.dilated.layout import Plan

Bias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows (Z,), heads (Z,), columns of queries (Z, c), of keys (Z, W)) -> score bias (Z, c, W)."""

_CELLS = 1 << 22
"""Cells of masks held at once."""


def dilated_sparse(
    q_BHTK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSV: torch.Tensor,
    plan: Plan,
    *,
    scale: float,
    mix_gradient: bool = False,
    bias: Bias | None = None,
) -> torch.Tensor:
    """As `dilated_reference`; the bias is a function of columns."""
    (B, H, T, _), (G, S) = q_BHTK.shape, k_BGSK.shape[1:3]
    N = B * T * H
    q_NK, k_NK, v_NV = (x.transpose(1, 2).flatten(0, 2) for x in (q_BHTK, k_BGSK, v_BGSV))
    row_B11 = torch.arange(B, device=q_NK.device).view(-1, 1, 1)
    head_H1 = torch.arange(H, device=q_NK.device).view(-1, 1)
    outs, lses, places = [], [], []
    for pattern, layout in zip(plan.patterns, plan.layouts, strict=True):
        slot = torch.tensor(pattern.slot, device=q_NK.device)

        def items(x: torch.Tensor, slot: torch.Tensor = slot) -> torch.Tensor:
            return x[:, slot].expand(B, -1, -1, -1).flatten(0, 2)  # (B|1, O, n, *) -> (Z, *)

        n = layout.q_at.shape[2]
        row, head = (x.expand(B, H, n).flatten() for x in (row_B11, head_H1))
        q_at, k_at = items(layout.q_at), items(layout.k_at)
        of_q = ((row[:, None] * T + q_at.clamp(min=0)) * H + head[:, None]).flatten()
        of_k = ((row[:, None] * S + k_at.clamp(min=0)) * G + head[:, None] // (H // G)).flatten()
        q = q_NK.index_select(0, of_q).view(*q_at.shape, -1)
        k, v = (x.index_select(0, of_k).view(*k_at.shape, -1) for x in (k_NK, v_NV))
        if layout.exchange is not None:
            k, v = layout.exchange(k.unflatten(0, (B, H)), v.unflatten(0, (B, H)))
        columns: list[torch.Tensor] = []
        if layout.q_segment is not None:
            assert layout.k_segment is not None and layout.q_order is not None and layout.k_order is not None
            marks = (layout.q_segment, layout.k_segment, layout.q_order, layout.k_order)
            columns = [*(items(x) for x in marks), row, head, q_at, k_at]
        cells = q.shape[1] * k.shape[1] * (1 if bias is None else H)  # a bias is made for all heads at once
        out, lse = _attend(q, k, v, columns, cells, plan.causal, scale, mix_gradient, bias)
        outs.append(out.flatten(0, 1))
        lses.append(lse.flatten())
        # what stands where there is no query goes into one more place, which is dropped
        places.append(torch.where(q_at.flatten() < 0, N, of_q))
    none = lses[0].new_full((N + 1,), float("-inf"))
    share_PN = shares(torch.stack([none.scatter(0, at, lse) for at, lse in zip(places, lses, strict=True)]))
    y_NV = at_least_float32(v_NV).new_zeros(N + 1, v_NV.shape[-1])
    for share_N, out, at in zip(share_PN, outs, places, strict=True):
        y_NV = y_NV.index_add(0, at, share_N.index_select(0, at)[:, None].to(y_NV.dtype) * out)
    return y_NV[:N].to(v_NV.dtype).view(B, T, H, -1).transpose(1, 2)


def _attend(
    q_ZcK: torch.Tensor,
    k_ZWK: torch.Tensor,
    v_ZWV: torch.Tensor,
    columns: list[torch.Tensor],
    cells: int,
    causal: bool,
    scale: float,
    lse_gradient: bool,
    bias: Bias | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of all items (Z, c, V) and its log-sum-exp (Z, c), as many items at once as masks may be held.

    `columns` are the arguments of `_mask`, (Z, ...) each; none: no mask besides the causal flag. `cells`: of one mask.
    """

    def some(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *columns: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mask = _mask(*columns, causal=causal, bias=bias)[:, None] if columns else None
        flag, operands = causal and mask is None, (q[:, None], k[:, None], v[:, None])
        out, lse = attention_lse(*operands, scale=scale, causal=flag, mask_BHTS=mask, lse_gradient=lse_gradient)
        return out[:, 0], lse[:, 0]

    size = max(1, _CELLS // cells)
    if q_ZcK.shape[0] <= size or (not columns and fused_lse(q_ZcK, v_ZWV)):
        return some(q_ZcK, k_ZWK, v_ZWV, *columns)
    again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    # `split`, not slices: the gradient of a slice is as large as what it was cut from
    found = [
        checkpoint(some, *part, use_reentrant=False, preserve_rng_state=False) if again else some(*part)
        for part in zip(*(x.split(size) for x in (q_ZcK, k_ZWK, v_ZWV, *columns)), strict=True)
    ]
    outs, lses = zip(*found, strict=True)
    return torch.cat(outs), torch.cat(lses)


def _mask(
    q_segment: torch.Tensor,
    k_segment: torch.Tensor,
    q_order: torch.Tensor,
    k_order: torch.Tensor,
    row: torch.Tensor,
    head: torch.Tensor,
    q_at: torch.Tensor,
    k_at: torch.Tensor,
    *,
    causal: bool,
    bias: Bias | None,
) -> torch.Tensor:
    """(Z, c, W): boolean, or the bias with -inf where a query may not see a key."""
    mask = q_segment[:, :, None] == k_segment[:, None, :]
    if causal:
        mask = mask & (k_order[:, None, :] <= q_order[:, :, None])
    mask = mask | (q_segment < 0)[:, :, None]  # no query stands there, and a query without keys would be a special case
    if bias is None:
        return mask
    return torch.where(mask, bias(row, head, q_at.clamp(min=0), k_at.clamp(min=0)), float("-inf"))
