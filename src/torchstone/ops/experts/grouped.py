"""Products of groups of rows, each group with a matrix of its own.

`sorted_product` is an operator: how many rows a group has is known only when it runs, so a compiler takes it as it is.
Its gradients are two more of the kind, the same product with the matrices the other way round, and the outer products
of each group's rows. Groups without rows cost nothing, and their matrices' gradient is 0.

Shapes: E experts, M rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _by_grouped_mm(x: torch.Tensor, w_EOI: torch.Tensor) -> bool:
    """Whether torch's kernel takes it: bfloat16 on a CUDA device, rows of a multiple of 16 bytes."""
    return x.is_cuda and x.dtype == w_EOI.dtype == torch.bfloat16 and not any(n % 8 for n in w_EOI.shape[1:])


def _runs(ends_E: torch.Tensor) -> list[tuple[int, int, int]]:
    """Expert, first row and the row after the last, of each group that has rows."""
    ends = ends_E.tolist()
    return [(e, a, b) for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) if a < b]


@torch.library.custom_op("torchstone::grouped_product", mutates_args=())
def sorted_product(x_MI: torch.Tensor, weight_EOI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Rows from ends[e - 1] to ends[e] times the matrix of e, (M, O); rows after the last end are 0."""
    if _by_grouped_mm(x_MI, weight_EOI):
        y_MO = F.grouped_mm(x_MI, weight_EOI.transpose(1, 2), offs=ends_E)
        rows_M1 = torch.arange(x_MI.shape[0], device=x_MI.device)[:, None]
        return torch.where(rows_M1 < ends_E[-1], y_MO, 0.0)  # the kernel leaves the rest as it was
    y_MO = x_MI.new_zeros(x_MI.shape[0], weight_EOI.shape[1])
    for e, a, b in _runs(ends_E):
        torch.mm(x_MI[a:b], weight_EOI[e].T, out=y_MO[a:b])
    return y_MO


@torch.library.custom_op("torchstone::grouped_outer", mutates_args=())
def _sorted_outer(g_MO: torch.Tensor, x_MI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """The sum of outer products of each group's rows, (E, O, I)."""
    w_EOI = x_MI.new_zeros(ends_E.shape[0], g_MO.shape[1], x_MI.shape[1])
    if _by_grouped_mm(x_MI, w_EOI) and g_MO.dtype == torch.bfloat16:
        return F.grouped_mm(g_MO.T, x_MI, offs=ends_E)
    for e, a, b in _runs(ends_E):
        torch.mm(g_MO[a:b].T, x_MI[a:b], out=w_EOI[e])
    return w_EOI


@sorted_product.register_fake
def _(x_MI, weight_EOI, ends_E):
    return x_MI.new_empty(x_MI.shape[0], weight_EOI.shape[1])


@_sorted_outer.register_fake
def _(g_MO, x_MI, ends_E):
    return x_MI.new_empty(ends_E.shape[0], g_MO.shape[1], x_MI.shape[1])


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _product_backward(ctx, g_MO):
    x_MI, weight_EOI, ends_E = ctx.saved_tensors
    want_x, want_w, _ = ctx.needs_input_grad
    g_MO = g_MO.contiguous()  # a sum's gradient is one number seen from everywhere
    return (
        sorted_product(g_MO, weight_EOI.transpose(1, 2), ends_E) if want_x else None,
        _sorted_outer(g_MO, x_MI, ends_E) if want_w else None,
        None,
    )


def _outer_backward(ctx, d_EOI):
    g_MO, x_MI, ends_E = ctx.saved_tensors
    want_g, want_x, _ = ctx.needs_input_grad
    return (
        sorted_product(x_MI, d_EOI, ends_E) if want_g else None,
        sorted_product(g_MO, d_EOI.transpose(1, 2), ends_E) if want_x else None,
        None,
    )


sorted_product.register_autograd(_product_backward, setup_context=_keep)
_sorted_outer.register_autograd(_outer_backward, setup_context=_keep)


def gathered_product(x_MI: torch.Tensor, weight_EOI: torch.Tensor, expert_M: torch.Tensor) -> torch.Tensor:
    """The same for few rows, whose matrices are copied out: (M, O)."""
    E = weight_EOI.shape[0]
    chosen_MOI = weight_EOI.index_select(0, expert_M.clamp(max=E - 1))
    y_MO = torch.bmm(chosen_MOI, x_MI[:, :, None])[..., 0]
    return torch.where((expert_M < E)[:, None], y_MO, 0.0)
