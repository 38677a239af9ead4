"""The product of reflections with its own backward, which keeps its output and one number a reflection.

Autograd of the definition keeps `x` before every reflection. Here each is made again from the one after it,
x = y + strength (u . x) u, with the number u . x of the forward pass: exact for every strength, also where M(u) has no
inverse.
"""

from __future__ import annotations

import torch


class _Householder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, u_CK, strength_C):
        ctx.shape, alongs = x.shape, []
        for place in reversed(range(u_CK.shape[-2])):
            u_K = u_CK[..., place, :]
            along = (u_K * x).sum(-1, keepdim=True)
            x = torch.addcmul(x, strength_C[..., place, None] * along, u_K, value=-1)
            alongs.append(along)
        ctx.save_for_backward(x, u_CK, strength_C, *alongs)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, u_CK, strength_C, *alongs = ctx.saved_tensors
        count = u_CK.shape[-2]
        grad_u, grad_strength = torch.empty_like(u_CK), torch.empty_like(strength_C)
        # alongs lie in the order of the forward pass, in which the first direction came last
        for place, along in zip(range(count), reversed(alongs), strict=True):
            u_K, factor = u_CK[..., place, :], strength_C[..., place, None]
            x = torch.addcmul(x, factor * along, u_K)
            pulled = (u_K * grad).sum(-1, keepdim=True)
            if ctx.needs_input_grad[1]:
                grad_u[..., place, :] = (-factor * (along * grad + pulled * x)).sum_to_size(u_K.shape)
            if ctx.needs_input_grad[2]:
                grad_strength[..., place, None] = (-along * pulled).sum_to_size(factor.shape)
            grad = torch.addcmul(grad, factor * pulled, u_K, value=-1)
        return grad.sum_to_size(ctx.shape) if ctx.needs_input_grad[0] else None, grad_u, grad_strength


def householder_fast(x: torch.Tensor, u_CK: torch.Tensor, strength: torch.Tensor | float = 2.0) -> torch.Tensor:
    """As `householder_reference`; it can be differentiated once."""
    if not isinstance(strength, torch.Tensor):
        strength = torch.full((u_CK.shape[-2],), strength, dtype=u_CK.dtype, device=u_CK.device)
    return _Householder.apply(x, u_CK, strength)
