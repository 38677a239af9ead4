"""Products of whole numbers of few bits with weights of two or three values, in packed bytes and before.

    q, scale = quantise(x, 8)                        # activations: whole numbers and what they count in
    w, beta = ternary(weight)                        # or `binary`
    ints = bit_product(q, pack(w, 3), 3)             # the sums of q times w, exact
    y = rescale(ints, scale, beta)

Shapes: ... any leading axes, N rows, I inputs, O outputs, G groups of inputs, n = I / G, J bytes of n weights.
"""

from __future__ import annotations

import torch

from torchstone.ops import forced_reference
from torchstone.ops.bitlinear.packed import blocked_product, fused_product
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
    "blocked_product",
    "fused_product",
    "pack",
    "packed_bytes",
    "quantise",
    "rescale",
    "ternary",
    "unpack",
]


def bit_product(q_NGn: torch.Tensor, packed_OGJ: torch.Tensor, levels: int) -> torch.Tensor:
    """Sums (N, O, G) of `q` times the weights of `levels` values in `packed`.

    Whole numbers, and exact in float32 while levels - 1 times the largest of `q` times n stays below 2^24, which are
    66,000 inputs a group at 8 bits: then every order of summation gives the same. One row, compiled, is one loop over
    the bytes; otherwise blocks of rows of the weights are unpacked one after the other.
    """
    if forced_reference():
        return bit_product_reference(q_NGn, packed_OGJ, levels)
    if torch.compiler.is_compiling() and q_NGn.shape[0] == 1:
        return fused_product(q_NGn, packed_OGJ, levels)
    return blocked_product(q_NGn, packed_OGJ, levels)
