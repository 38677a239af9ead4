"""Stochastic gradient descent with momentum (Sutskever et al. 2013, ICML, volume 28).

    g = gradient + weight_decay w;  v = momentum v + g;  w = w - lr v,  or with Nesterov  w - lr (g + momentum v)

The first v is g. Weight decay is coupled, as in `torch.optim.SGD`: it goes through the momentum. What decays is what
does for AdamW: matrices, and no norms and biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, model_validator

from torchstone.train.optimizers import NamedParameter, OptimizerSpec, decay_groups

__all__ = ["SGDSpec"]


class SGDSpec(OptimizerSpec):
    """Gradient descent with momentum and coupled weight decay."""

    paper: ClassVar[str] = "Sutskever et al. 2013, ICML"

    weight_decay: float = Field(5e-4, ge=0, le=10)
    """Coupled weight decay, added to the gradient, of matrices; norms, biases and other vectors have none."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Decay of the sum of gradients."""
    nesterov: bool = False
    """Look one step ahead along the momentum."""

    @model_validator(mode="after")
    def _ahead(self) -> SGDSpec:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: looks ahead along the momentum, which is 0")
        return self

    def build(self, named: Sequence[NamedParameter]) -> torch.optim.Optimizer:
        groups = decay_groups(named, self.weight_decay, peak=self.lr)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)
