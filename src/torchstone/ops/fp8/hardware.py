"""The product on a device that multiplies numbers of 8 bits with these scales: Hopper, by
`torch.nn.functional.scaled_mm`.

Written from torch's documentation and its tests of block scales, and run by tests/cuda where there is such a device.
The first product on a device is compared with the definition, and where it differs or fails, all are emulated and one
line says so.

Shapes: as of `reference`.
"""

from __future__ import annotations

import functools
import sys

import torch
import torch.nn.functional as F

from torchstone.ops.fp8.reference import product_reference, quantise

_TILE = 128


def takes(qa_MK: torch.Tensor, qb_NK: torch.Tensor, tile: int, rows_b: int) -> bool:
    """Whether the kernel serves these: whole tiles of 128 on a Hopper device that passed the comparison."""
    if not qa_MK.is_cuda or tile != _TILE or rows_b not in (1, _TILE):
        return False
    N, K = qb_NK.shape
    return K % _TILE == 0 and N % (_TILE if rows_b > 1 else 16) == 0 and _works(qa_MK.device)


def product(
    qa_MK: torch.Tensor, sa_MS: torch.Tensor, qb_NK: torch.Tensor, sb: torch.Tensor, rows_b: int
) -> torch.Tensor:
    """As `product_reference`, in float32."""
    return _product(qa_MK, sa_MS, qb_NK, sb, rows_b).float()


def _product(
    qa_MK: torch.Tensor, sa_MS: torch.Tensor, qb_NK: torch.Tensor, sb: torch.Tensor, rows_b: int
) -> torch.Tensor:
    # scales of rows lie column after column; those of blocks along K, padded to a multiple of four
    if rows_b == 1:
        recipe, sb = F.ScalingType.BlockWise1x128, sb.t().contiguous().t()
    else:
        recipe, sb = F.ScalingType.BlockWise128x128, F.pad(sb, (0, -sb.shape[1] % 4)).t()
    return F.scaled_mm(
        qa_MK.contiguous(),
        qb_NK.contiguous().t(),
        sa_MS.t().contiguous().t(),
        F.ScalingType.BlockWise1x128,
        sb,
        recipe,
        output_dtype=torch.bfloat16,
    )


@functools.cache
def _works(device: torch.device) -> bool:
    if torch.cuda.get_device_capability(device)[0] != 9:  # others have other formats of scales
        return False
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, 384, generator=generator, device=device) for n in (64, 256))
    try:
        for rows_b in (1, _TILE):
            (qa, sa), (qb, sb) = quantise(a), quantise(b, rows=rows_b)
            wanted = product_reference(qa, sa, qb, sb, _TILE, rows_b)
            off = (_product(qa, sa, qb, sb, rows_b).float() - wanted).abs().max() / wanted.abs().max()
            if not off < 0.01:  # bfloat16 rounds by 0.4 %
                raise RuntimeError(f"differs from the definition by {float(off):.2g} of the largest")
    except (RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
        print(f"fp8: products are emulated; this device's own: {str(error).splitlines()[0][:120]}", file=sys.stderr)
        return False
    return True
