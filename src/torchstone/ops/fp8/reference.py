"""Products of numbers of 8 bits with scales of small blocks: the definitions (DeepSeek-AI 2024, arXiv 2412.19437,
section 3.3).

    scale = max(amax, 1e-4) / 448        q = E4M3(x / scale)        y = sum over s of (qa_s qb_s^T) * sa_s * sb_s

Each block has a scale of its own: 1 x tile of activations and gradients, along what the product sums over, and tile x
tile of weights. Sums run in float32 over one tile at a time, and each such sum is multiplied by both scales before it
is added to the rest ("promotion"). Numbers are rounded to the nearest of E4M3, four bits of exponent and three of
mantissa, by torch's cast.

Shapes: R rows, K what is summed over, M and N rows of the two factors, S = ceil(K / tile).
"""

from __future__ import annotations

import torch

from torchstone.ops import at_least_float32

LARGEST = 448.0
"""Of E4M3."""
_LEAST = 1e-4
"""Amax that is divided by at least: of a block of zeros too."""


def quantise(
    x_RK: torch.Tensor, tile: int = 128, rows: int = 1, power_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers in float8_e4m3fn (R, K), and the scales (ceil(R / rows), S) of blocks of `rows` x `tile`, in at least
    float32.

    With `power_of_two`, scales are rounded up to one, so that they change no mantissa.
    """
    x_RK = at_least_float32(x_RK)
    R, K = x_RK.shape
    padded = torch.nn.functional.pad(x_RK, (0, -K % tile, 0, -R % rows))
    amax = padded.unflatten(1, (-1, tile)).unflatten(0, (-1, rows)).abs().amax((1, 3))
    scale = amax.clamp(min=_LEAST) / LARGEST
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    q_RK = (x_RK / spread(scale, R, K, tile, rows)).clamp(-LARGEST, LARGEST)
    return q_RK.to(torch.float8_e4m3fn), scale


def spread(scale: torch.Tensor, R: int, K: int, tile: int = 128, rows: int = 1) -> torch.Tensor:
    """The scale of each number (R, K)."""
    return scale.repeat_interleave(rows, 0)[:R].repeat_interleave(tile, 1)[:, :K]


def dequantise(q_RK: torch.Tensor, scale: torch.Tensor, tile: int = 128, rows: int = 1) -> torch.Tensor:
    """The numbers (R, K) that were quantised, but for rounding."""
    return q_RK.to(scale.dtype) * spread(scale, q_RK.shape[0], q_RK.shape[1], tile, rows)


def product_reference(
    qa_MK: torch.Tensor,
    sa_MS: torch.Tensor,
    qb_NK: torch.Tensor,
    sb: torch.Tensor,
    tile: int = 128,
    rows_b: int = 1,
) -> torch.Tensor:
    """(M, N), the rows of the first times those of the second; `sb` (ceil(N / rows_b), S)."""
    sb_NS = sb.repeat_interleave(rows_b, 0)[: qb_NK.shape[0]]
    y_MN = sa_MS.new_zeros(qa_MK.shape[0], qb_NK.shape[0])
    for s, (a, b) in enumerate(zip(qa_MK.split(tile, 1), qb_NK.split(tile, 1), strict=True)):
        y_MN = y_MN + (a.to(y_MN.dtype) @ b.to(y_MN.dtype).T) * sa_MS[:, s, None] * sb_NS[None, :, s]
    return y_MN
