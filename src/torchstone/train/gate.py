"""Gradient gates: what stands between a step's gradient and the optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from torchstone.train.engine import Trainer

__all__ = ["GradientGate"]


class GradientGate(Protocol):
    """Changes gradients after they were summed over micro-batches and ranks and clipped, before any moment of the
    optimiser sees them. What it draws is a function of its key and the step, alike on all ranks."""

    def begin(self, trainer: Trainer) -> None:
        """Before the first step of a training that begins; not of one that goes on."""
        ...

    def before(self, step: int) -> None:
        """Change the gradients of the step."""
        ...

    def after(self, step: int) -> None:
        """After the optimiser moved the parameters."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """What going on needs."""
        ...

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on with what `tensors` gave.

        Raises:
            TorchstoneError: it is another gate's.
        """
        ...
