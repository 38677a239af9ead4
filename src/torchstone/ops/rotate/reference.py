"""Rotation of channel pairs, the definition: (a, b) -> (a cos - b sin, b cos + a sin).

Shapes: x (..., T, K); cos and sin (..., T, R/2) with R at most K; channels from R on pass.
"""

from __future__ import annotations

import torch


def rotate_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """`x` with pair i being channels (i, i + R/2), or (2i, 2i + 1) if interleaved."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned
