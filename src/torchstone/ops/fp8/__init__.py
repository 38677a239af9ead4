"""Products of numbers of 8 bits (E4M3) with a scale for each small block, and a projection made of three of them.

    q, scale = quantise(x)                           # 1 x 128 tiles
    w, beta = quantise(weight, rows=128)             # 128 x 128 blocks
    y = fp8_product(q, scale, w, beta, rows_b=128)   # sums in float32, promoted every 128
    y = fp8_linear(x, [weight])                      # with a backward pass of two such products

On a CPU, and wherever the hardware has no such product, it is emulated with its exact numbers; on Hopper it is real
(`torchstone.ops.fp8.hardware`).

Shapes: M rows, I inputs, O outputs, K what is summed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from torchstone.ops import forced_reference
from torchstone.ops.fp8 import hardware
from torchstone.ops.fp8.reference import LARGEST, dequantise, product_reference, quantise

__all__ = ["LARGEST", "dequantise", "fp8_linear", "fp8_product", "product_reference", "quantise"]


def fp8_product(
    qa_MK: torch.Tensor,
    sa_MS: torch.Tensor,
    qb_NK: torch.Tensor,
    sb: torch.Tensor,
    tile: int = 128,
    rows_b: int = 1,
) -> torch.Tensor:
    """Rows times rows, (M, N), of what `quantise` gave; in at least float32."""
    if not forced_reference() and hardware.takes(qa_MK, qb_NK, tile, rows_b):
        return hardware.product(qa_MK, sa_MS, qb_NK, sb, rows_b)
    return product_reference(qa_MK, sa_MS, qb_NK, sb, tile, rows_b)


def fp8_linear(
    x: torch.Tensor, weights_OI: Sequence[torch.Tensor], tile: int = 128, power_of_two: bool = False
) -> torch.Tensor:
    """``x W^T`` (..., O) for the slices `weights_OI` of W one below the other, each with blocks of its own.

    All three products are of 8 bits. Forward: x in 1 x tile along I, W in tile x tile. Gradient of x: that of y in
    1 x tile along O, and the same W. Gradient of W: that of y and x, both in 1 x tile along the rows; x is kept in
    8 bits between, and quantised the other way from those.
    """
    kind = x.device.type
    dtype = x.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        x_MI = x.flatten(0, -2)
        if torch.is_grad_enabled():
            y_MO = _Linear.apply(x_MI, tile, power_of_two, *weights_OI)
        else:  # keeps nothing, and compiles as a whole
            y_MO, _ = _forward(x_MI, weights_OI, tile, power_of_two)
    return y_MO.view(*x.shape[:-1], -1).to(dtype)


def _forward(
    x_MI: torch.Tensor, weights_OI: Sequence[torch.Tensor], tile: int, power_of_two: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The product, and what was quantised for it: numbers and scales of x, then of each weight."""
    q, scale = quantise(x_MI, tile, 1, power_of_two)
    made = [quantise(w_OI, tile, tile, power_of_two) for w_OI in weights_OI]
    y_MO = torch.cat([fp8_product(q, scale, w, beta, tile, tile) for w, beta in made], -1)
    return y_MO, [q, scale, *(part for pair in made for part in pair)]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MI: torch.Tensor, tile: int, power_of_two: bool, *weights_OI: torch.Tensor) -> Any:
        y_MO, kept = _forward(x_MI, weights_OI, tile, power_of_two)
        ctx.save_for_backward(*kept)
        ctx.how, ctx.dtypes = (tile, power_of_two), (x_MI.dtype, weights_OI[0].dtype)
        return y_MO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_MO: torch.Tensor) -> Any:
        q, scale, *made = ctx.saved_tensors
        (tile, power_of_two), (of_x, of_w) = ctx.how, ctx.dtypes
        pairs = list(zip(made[::2], made[1::2], strict=True))
        pieces = g_MO.split([w.shape[0] for w, _ in pairs], -1)
        dx, dw = None, [None] * len(pairs)
        if ctx.needs_input_grad[0]:
            dx = sum(
                fp8_product(*quantise(g, tile, 1, power_of_two), w.t(), beta.t(), tile, tile)
                for g, (w, beta) in zip(pieces, pairs, strict=True)
            )
            dx = dx.to(of_x)  # type: ignore[union-attr]
        if any(ctx.needs_input_grad[3:]):
            columns = quantise(dequantise(q, scale, tile).t(), tile, 1, power_of_two)
            dw = [fp8_product(*quantise(g.t(), tile, 1, power_of_two), *columns, tile).to(of_w) for g in pieces]  # type: ignore[misc]
        return dx, None, None, *dw
