"""Rotation of channel pairs (rotary positions)."""

from __future__ import annotations

import torch

from torchstone.ops import forced_reference
from torchstone.ops.rotate.fast import rotate_fast
from torchstone.ops.rotate.reference import rotate_reference

__all__ = ["rotate", "rotate_fast", "rotate_reference"]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """`x` (..., T, K) with its first R channels turned in pairs; cos, sin (..., T, R/2).

    A compiler fuses the definition by itself; eager code takes the path with its own backward, which gives the angles
    no gradient.
    """
    if torch.compiler.is_compiling() or forced_reference() or cos.requires_grad or sin.requires_grad:
        return rotate_reference(x, cos, sin, interleaved)
    return rotate_fast(x, cos, sin, interleaved)
