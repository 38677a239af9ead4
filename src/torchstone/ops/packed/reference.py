"""Symmetric quantisation in groups of 16, the definition and the only path.

A group of 16 numbers shares a bfloat16 scale, and each is a whole number of `bits` - 1 bits times it. The scale's 16
bits are one more for each number, so `bits` is the exact average and a group takes 2 * `bits` bytes.

Shapes: ... any leading axes, n numbers, G groups of 16, b bits of a number, A = 2 * (b + 1) * G bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BITS = range(4, 9)
"""Bits a number, on average, that there are."""
_GROUP = 16


def packed_bytes(n: int, bits: int) -> int:
    """A, the bytes of `n` numbers; those of an unfinished group are counted whole."""
    return 2 * bits * -(-n // _GROUP)


def pack(x_n: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes (..., A) of numbers (..., n). The largest number of a group is met up to the rounding of its scale."""
    b, top = bits - 1, 2 ** (bits - 2) - 1
    x_G16 = F.pad(x_n.float(), (0, -x_n.shape[-1] % _GROUP)).unflatten(-1, (-1, _GROUP))
    scale_G1 = (x_G16.abs().amax(-1, keepdim=True) / top).to(torch.bfloat16)
    step_G1 = torch.where(scale_G1 > 0, scale_G1, 1.0).float()
    whole_G16 = (x_G16 / step_G1).round().clamp(-top, top).long() + top
    # eight numbers of b bits are b bytes, by way of one word
    places = torch.arange(8, device=x_n.device)
    word_G2 = (whole_G16.unflatten(-1, (2, 8)) << (b * places)).sum(-1)
    bytes_G2b = (word_G2[..., None] >> (8 * places[:b])) & 255
    return torch.cat([bytes_G2b.flatten(-2).to(torch.uint8), scale_G1.view(torch.uint8)], -1).flatten(-2)


def unpack(bytes_A: torch.Tensor, n: int, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers (..., n) from what `pack` made of them."""
    b, top = bits - 1, 2 ** (bits - 2) - 1
    bytes_GA = bytes_A.unflatten(-1, (-1, 2 * bits))
    scale_G1 = bytes_GA[..., 2 * b :].contiguous().view(torch.bfloat16)
    places = torch.arange(8, device=bytes_A.device)
    word_G2 = (bytes_GA[..., : 2 * b].long().unflatten(-1, (2, b)) << (8 * places[:b])).sum(-1)
    whole_G16 = ((word_G2[..., None] >> (b * places)) & (2**b - 1)).flatten(-2) - top
    return (whole_G16.to(dtype) * scale_G1.to(dtype)).flatten(-2)[..., :n]
