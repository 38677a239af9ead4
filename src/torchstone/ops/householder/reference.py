"""Householder reflections, the definition: a product M(u_1) M(u_2) ... M(u_C) x of M(u) x = x - strength (u . x) u.

Strength 2 is a reflection, of determinant -1; any other makes the component along u 1 - strength times as long.

Shapes: x (..., K); u_CK (..., C, K), C directions; strength a number, or (..., C). Leading axes broadcast.
"""

from __future__ import annotations

import torch

EPS = 1e-12
"""Least length that a direction is divided by."""


def unit(u_CK: torch.Tensor) -> torch.Tensor:
    """Directions of length 1; zero stays zero."""
    return u_CK / torch.linalg.vector_norm(u_CK, dim=-1, keepdim=True).clamp_min(EPS)


def householder_reference(x: torch.Tensor, u_CK: torch.Tensor, strength: torch.Tensor | float = 2.0) -> torch.Tensor:
    """`x` after the product, the last direction first; directions are of length 1 already."""
    for place in reversed(range(u_CK.shape[-2])):
        u_K = u_CK[..., place, :]
        factor = strength[..., place, None] if isinstance(strength, torch.Tensor) else strength
        x = x - factor * (u_K * x).sum(-1, keepdim=True) * u_K
    return x
