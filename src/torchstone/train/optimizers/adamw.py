"""AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101), torch's fused kernel where the device has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from torchstone.train.optimizers import NamedParameter, OptimizerSpec, decay_groups

__all__ = ["AdamWSpec"]


class AdamWSpec(OptimizerSpec):
    """Adam with decoupled weight decay."""

    paper: ClassVar[str] = "Loshchilov and Hutter 2017, arXiv 1711.05101"

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moments."""
    eps: float = Field(1e-8, gt=0, le=1)
    """Added to the root of the second moment."""

    def build(self, named: Sequence[NamedParameter]) -> torch.optim.Optimizer:
        groups = decay_groups(named, self.weight_decay, peak=self.lr)
        fused = all(p.value.is_floating_point() and p.value.device.type in ("cpu", "cuda", "mps") for p in named)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused)
