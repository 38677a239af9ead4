"""Products of whole numbers of few bits with weights of two or three values, in packed bytes and before.

    q, scale = quantise(x, 8)                        # activations: whole numbers and what they count in
    w, beta = ternary(weight)                        # or `binary`
    ints = bit_product(q, pack(w, 3), 3)             # the sums of q times w, exact
    y = rescale(ints, scale, beta)

Shapes: ... any leading axes, N rows, I inputs, O outputs, G groups of inputs, n = I / G, J bytes of n weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from torchstone.ops import forced_reference
from torchstone.ops.bitlinear.packed import blocked_sums, code_sums, looped_sums
from torchstone.ops.bitlinear.reference import (
    binary,
    bit_product_reference,
    pack,
    packed_bytes,
    quantise,
    rescale,
    ternary,
    unpack,
)

__all__ = [
    "binary",
    "bit_product",
    "bit_product_reference",
    "blocked_sums",
    "code_sums",
    "looped_sums",
    "pack",
    "packed_bytes",
    "quantise",
    "rescale",
    "ternary",
    "unpack",
]


def bit_product(q_NGn: torch.Tensor, packed_OGJ: torch.Tensor, levels: int) -> torch.Tensor:
    """Sums (N, O, G) of `q`, whole numbers of at most 8 bits, times the weights of `levels` values in `packed`.

    Exact in float32 while 254 n stays below 2^24, which is 66,000 inputs a group: every order of summation then gives
    the same.
    """
    if forced_reference():
        return bit_product_reference(q_NGn, packed_OGJ, levels)
    bits, n = levels - 1, q_NGn.shape[-1]
    q_NGm = F.pad(q_NGn.to(torch.int8), (0, 8 // bits * packed_OGJ.shape[-1] - n))
    sums_NOG = code_sums(q_NGm, packed_OGJ, bits).to(q_NGn.dtype)
    return (2 * sums_NOG if levels == 2 else sums_NOG) - q_NGn.sum(-1)[:, None]
