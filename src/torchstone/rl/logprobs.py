"""Log-probabilities of tokens in the distribution that they are drawn from: after temperature and truncation.

A sampler that truncates draws from probabilities over the tokens it kept, so a ratio of policies is one of such
probabilities: over the whole vocabulary it would carry the mass that was cut. Which tokens are kept is decided by the
policy as it is now and has no gradient; the drawn token is always one of them, also where the policy has moved since.

Shapes: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.utils.checkpoint import checkpoint

from torchstone.generate.sampling import Sampling
from torchstone.model.head import Product
from torchstone.ops import at_least_float32

__all__ = ["log_probabilities"]

_LOGITS = 1 << 23
"""Logits that exist at once; where there are more, each part is made again in the backward pass."""


def log_probabilities(
    product: Product, targets_N: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target (N,), differentiable, and the entropy (N,) of the distribution, which is not."""

    def of(h_nD: torch.Tensor, target_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits_nV = at_least_float32(replace(product, h=h_nD).logits())
        scores_nV, at = sampling.adjust(logits_nV), target_n[:, None]
        if sampling.top_k is not None or sampling.top_p is not None:
            scores_nV = scores_nV.scatter(1, at, (logits_nV / sampling.temperature).gather(1, at))
        logp_nV = scores_nV.log_softmax(-1)
        return logp_nV.gather(1, at)[:, 0], torch.special.entr(logp_nV.detach().exp()).sum(-1)

    rows = max(1, _LOGITS // product.weight.shape[0])
    if len(targets_N) <= rows:
        return of(product.h, targets_N)
    parts = [
        checkpoint(of, h, target, use_reentrant=False)
        for h, target in zip(product.h.split(rows), targets_N.split(rows), strict=True)
    ]
    logp, entropy = zip(*parts, strict=True)
    return torch.cat(logp), torch.cat(entropy)
