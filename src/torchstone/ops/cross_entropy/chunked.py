"""Cross-entropy of a linear head over chunks of rows, with the gradient made in the same pass.

The gradient of a row's logits, ``weight * (softmax - onehot)``, needs nothing from later in the network, so it is
formed while the chunk's logits are there; the backward pass only scales. Memory is one chunk of logits whatever N is.
"""

from __future__ import annotations

import torch

from torchstone.ops import at_least_float32

_LOGITS = 1 << 23
"""Logits that may exist at once: 32 MB in float32, large enough that the products run at full speed."""


def _rows(chunk: int | None, vocabulary: int) -> int:
    return chunk or max(16, _LOGITS // vocabulary)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What autocast would multiply in: a custom Function sees its inputs as they come."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype == torch.float32:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _logits(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None) -> torch.Tensor:
    """Logits (n, V), in the dtype of the product until something is added to them."""
    z = h @ weight.T
    if bias is not None:
        z = at_least_float32(z) + at_least_float32(bias)
    return z if softcap is None else softcap * torch.tanh(at_least_float32(z) / softcap)


def _log_probabilities(z: torch.Tensor) -> torch.Tensor:
    """Log-softmax in at least float32: one fused pass, where log-sum-exp and a subtraction take three."""
    return torch.log_softmax(z, -1, dtype=torch.promote_types(z.dtype, torch.float32))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_ND, weight_VD, targets_N, weights_N, bias_V, softcap, rows, dtype):
        used = targets_N >= 0
        scale = used.to(at_least_float32(h_ND).dtype)
        if weights_N is not None:
            scale = torch.where(used, weights_N.to(scale.dtype), 0.0)
        weight = weight_VD.to(dtype)
        want_h, want_w, want_b = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[4]
        grad_h = torch.empty_like(h_ND) if want_h else None
        grad_w = torch.zeros_like(weight_VD) if want_w else None
        grad_b = torch.zeros_like(bias_V) if want_b else None
        total = scale.new_zeros(())
        for a in range(0, h_ND.shape[0], rows):
            part = slice(a, a + rows)
            keep, target, by = used[part], targets_N[part].clamp(min=0)[:, None], scale[part][:, None]
            h = torch.where(keep[:, None], h_ND[part], 0).to(dtype)
            z = _logits(h, weight, bias_V, softcap)
            logp = _log_probabilities(z)
            total = total - (by * logp.gather(1, target)).sum()
            if not (want_h or want_w or want_b):
                continue
            g = logp.exp_()
            g.scatter_add_(1, target, torch.full_like(target, -1, dtype=g.dtype))
            if softcap is not None:
                g.mul_(1 - (z / softcap) ** 2)
            if grad_b is not None:
                grad_b += (by.T @ g)[0]
            # a row's weight goes onto its D channels rather than onto its V logits: V is larger
            g = g.to(dtype)
            if grad_h is not None:
                grad_h[part] = (g @ weight) * by
            if grad_w is not None:
                grad_w += g.T @ (h * by).to(dtype)
        ctx.save_for_backward(grad_h, grad_w, grad_b)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_h, grad_w, grad_b = (
            None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors
        )
        return grad_h, grad_w, None, None, grad_b, None, None, None


def chunked_cross_entropy(
    h_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor | None,
    bias_V: torch.Tensor | None,
    softcap: float | None,
    chunk: int | None,
) -> torch.Tensor:
    """See `torchstone.ops.cross_entropy.linear_cross_entropy`."""
    rows, dtype = _rows(chunk, weight_VD.shape[0]), _compute_dtype(h_ND)
    return _Chunked.apply(h_ND, weight_VD, targets_N, weights_N, bias_V, softcap, rows, dtype)


def chunked_nll(
    h_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    softcap: float | None,
    chunk: int | None,
) -> torch.Tensor:
    """See `torchstone.ops.cross_entropy.linear_nll`."""
    rows, dtype = _rows(chunk, weight_VD.shape[0]), _compute_dtype(h_ND)
    weight, parts = weight_VD.to(dtype), []
    for a in range(0, h_ND.shape[0], rows):
        target = targets_N[a : a + rows]
        h = torch.where((target >= 0)[:, None], h_ND[a : a + rows], 0).to(dtype)
        z = _logits(h, weight, bias_V, softcap)
        nll = -_log_probabilities(z).gather(1, target.clamp(min=0)[:, None])[:, 0]
        parts.append(torch.where(target >= 0, nll, 0.0))
    return torch.cat(parts) if parts else h_ND.new_zeros(0)
