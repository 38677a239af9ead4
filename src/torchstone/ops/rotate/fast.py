"""Rotation in place of fresh memory, with its own backward: a rotation's gradient is the opposite rotation.

Eager autograd of the definition makes some twenty kernels of it, half of them to put gradients of slices together.
"""

from __future__ import annotations

import torch


def _pairs(x: torch.Tensor, half: int, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        (x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]) if interleaved else (x[..., :half], x[..., half : 2 * half])
    )


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    half = cos.shape[-1]
    out = torch.empty_like(x)
    (a, b), (u, v) = _pairs(x, half, interleaved), _pairs(out, half, interleaved)
    torch.mul(a, cos, out=u).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=v).addcmul_(a, sin)
    if x.shape[-1] > 2 * half:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grad, cos, -sin, ctx.interleaved), None, None, None


def rotate_fast(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """As `rotate_reference`; `cos` and `sin` get no gradient."""
    return _Rotate.apply(x, cos.to(x.dtype), sin.to(x.dtype), interleaved)
