"""Products of Householder reflections, and of reflections of another strength (contractions along a direction)."""

from __future__ import annotations

import torch

from torchstone.ops import at_least_float32, forced_reference
from torchstone.ops.householder.fast import householder_fast
from torchstone.ops.householder.reference import householder_reference, unit

__all__ = ["householder", "householder_fast", "householder_reference"]


def householder(x: torch.Tensor, u_CK: torch.Tensor, strength: torch.Tensor | float = 2.0) -> torch.Tensor:
    """M(u_1) M(u_2) ... M(u_C) x of M(u) x = x - strength (u . x) u / |u|^2: the last direction acts first.

    With strength 2 the inverse is the same product of directions in reverse order, ``u_CK.flip(-2)``. No K x K matrix
    is made. A compiler fuses the definition by itself; eager code takes the path with its own backward.

    Args:
        x: vectors (..., K).
        u_CK: directions (..., C, K) of any length; their leading axes broadcast with those of `x`.
        strength: a number, or (..., C).

    Source: Householder 1958; as parameters of relations Li et al. 2022, arXiv 2202.07919, sections 3.1 and 3.2.
    """
    u_CK = unit(at_least_float32(u_CK))
    if torch.compiler.is_compiling() or forced_reference():
        return householder_reference(at_least_float32(x), u_CK, strength)
    return householder_fast(at_least_float32(x), u_CK, strength)
