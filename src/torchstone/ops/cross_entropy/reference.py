"""Cross-entropy of a linear head, the definition."""

from __future__ import annotations

import torch

from torchstone.ops import at_least_float32


def linear_nll_reference(
    h_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Negative log-likelihood in nats per row (N,), zero where the target is below zero."""
    used = targets_N >= 0
    h = torch.where(used[:, None], h_ND, 0)
    logits = at_least_float32(h) @ at_least_float32(weight_VD).T
    if bias_V is not None:
        logits = logits + at_least_float32(bias_V)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    nll = torch.logsumexp(logits, -1) - logits.gather(1, targets_N.clamp(min=0)[:, None])[:, 0]
    return torch.where(used, nll, 0.0)
