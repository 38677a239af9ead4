"""Cross-entropy of a linear head, in chunks: all logits never exist at once."""

from __future__ import annotations

import torch

from torchstone.ops import forced_reference
from torchstone.ops.cross_entropy.chunked import chunked_cross_entropy, chunked_nll, logits_at_once
from torchstone.ops.cross_entropy.reference import linear_nll_reference

__all__ = ["linear_cross_entropy", "linear_nll", "linear_nll_reference", "logits_at_once"]


def linear_cross_entropy(
    h_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor | None = None,
    *,
    bias_V: torch.Tensor | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """Sum over n of ``weights[n] * -log softmax(h[n] weight^T + bias)[targets[n]]``, a scalar in at least float32.

    Targets below zero count nothing, whatever their row of `h` holds (NaN included). `chunk` is the number of rows
    whose logits exist at a time.
    """
    if forced_reference():
        nll = linear_nll_reference(h_ND, weight_VD, targets_N, bias_V=bias_V, softcap=softcap)
        return (nll if weights_N is None else nll * weights_N.to(nll.dtype)).sum()
    return chunked_cross_entropy(h_ND, weight_VD, targets_N, weights_N, bias_V, softcap, chunk)


def linear_nll(
    h_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """The same loss per row (N,), in nats, without a gradient: for evaluation."""
    with torch.no_grad():
        if forced_reference():
            return linear_nll_reference(h_ND, weight_VD, targets_N, bias_V=bias_V, softcap=softcap)
        return chunked_nll(h_ND, weight_VD, targets_N, bias_V, softcap, chunk)
