"""Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365): what a value contributes to a number.

    attribution_i = (x_i - x'_i) * integral over a from 0 to 1 of d f(x' + a (x - x')) / d x_i

The sum of all attributions is f(x) - f(x'), but for the error of the sum that stands for the integral.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from torchstone.errors import TorchstoneError

__all__ = ["Rule", "integrated_gradients"]

Rule = Literal["left", "right", "midpoint"]
"""Where each of N steps is looked at: at k/N, at (k + 1)/N, or between the two."""
_AT = {"left": 0.0, "right": 1.0, "midpoint": 0.5}


def integrated_gradients(
    f: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    baseline: torch.Tensor | float = 0.0,
    steps: int = 20,
    rule: Rule = "midpoint",
    batch: int | None = None,
) -> torch.Tensor:
    """Attributions, of the shape of `x`.

    Args:
        f: copies (n, *shape) -> numbers (n,), one of each copy alone.
        x: where the path ends.
        baseline: where it begins.
        steps: N, copies along the path.
        rule: where each step is looked at.
        batch: copies at once; None takes all.

    Raises:
        TorchstoneError: no step, none at once, or an unknown rule.
    """
    if steps < 1:
        raise TorchstoneError(f"steps: needs 1 or more, got {steps}")
    if batch is not None and batch < 1:
        raise TorchstoneError(f"batch: needs 1 or more, got {batch}")
    if rule not in _AT:
        raise TorchstoneError(f"rule: needs {', '.join(_AT)}, got {rule!r}")
    x = x.detach()
    start = torch.as_tensor(baseline, dtype=x.dtype, device=x.device).expand_as(x)
    shares = (torch.arange(steps, dtype=x.dtype, device=x.device) + _AT[rule]) / steps
    total = torch.zeros_like(x)
    for share in shares.split(batch or steps):
        share = share.view(-1, *[1] * x.dim())
        copies = (start + share * (x - start)).requires_grad_()
        (gradient,) = torch.autograd.grad(f(copies).sum(), copies)
        total += gradient.sum(0)
    return (x - start) * total / steps
