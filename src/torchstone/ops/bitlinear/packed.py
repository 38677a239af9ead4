"""Products straight from packed bytes: a loop that a compiler makes one kernel of, and an operator for all else.

Shapes: N rows, O outputs, G groups of inputs, n inputs of a group, J bytes of n weights, P weights in a byte.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from torchstone.ops.bitlinear.reference import unpack

_BLOCK = 2**20
"""Weights that are unpacked at once."""


def fused_product(q_NGn: torch.Tensor, packed_OGJ: torch.Tensor, levels: int) -> torch.Tensor:
    """Sums (1, O, G) of one row. No weight is ever unpacked to memory once this is compiled.

    A code under its mask is the code times a power of two, by which the input is divided beforehand: that is exact, and
    spares the shift. Codes are weights plus one (or half of that), so the sum of the inputs comes off in the end.
    """
    bits = 1 if levels == 2 else 2
    J = packed_OGJ.shape[-1]
    q_PGJ = F.pad(q_NGn[0], (0, 8 // bits * J - q_NGn.shape[-1])).unflatten(-1, (-1, J)).transpose(0, 1)
    # a compiler that takes weights for constants would unpack them for good; what depends on the input it cannot
    there = (q_NGn[0, 0, 0] == q_NGn[0, 0, 0]).to(torch.int32)
    word_OGJ = packed_OGJ.to(torch.int32) * there
    sums_OG: torch.Tensor | float = 0.0
    for place in range(8 // bits):
        low = bits * place
        code_OGJ = (word_OGJ & ((2**bits - 1) << low)).to(q_NGn.dtype)
        sums_OG = sums_OG + (code_OGJ * (q_PGJ[place] * 2.0**-low)).sum(-1)
    return (sums_OG * (2 if levels == 2 else 1) - q_NGn[0].sum(-1))[None]


@torch.library.custom_op("torchstone::bit_product", mutates_args=())
def blocked_product(q_NGn: torch.Tensor, packed_OGJ: torch.Tensor, levels: int) -> torch.Tensor:
    """Sums (N, O, G), a block of outputs after the other, whose weights alone are unpacked."""
    N, G, n = q_NGn.shape
    ints_NOG = q_NGn.new_empty(N, packed_OGJ.shape[0], G)
    rows = max(1, _BLOCK // (G * n))
    for at in range(0, packed_OGJ.shape[0], rows):
        w_oGn = unpack(packed_OGJ[at : at + rows], n, levels, q_NGn.dtype)
        for g in range(G):
            ints_NOG[:, at : at + rows, g] = q_NGn[:, g] @ w_oGn[:, g].T
    return ints_NOG


@blocked_product.register_fake
def _(q_NGn, packed_OGJ, levels):
    return q_NGn.new_empty(q_NGn.shape[0], packed_OGJ.shape[0], q_NGn.shape[1])
