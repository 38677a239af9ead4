"""SwiGLU (Shazeer 2020, arXiv 2002.05202, eq. 6): a gate with silu."""

from __future__ import annotations

from collections.abc import Callable

import torch

from torchstone.model.feedforward import ACTIVATIONS
from torchstone.model.feedforward._gated import GatedSpec

__all__ = ["SwiGLUSpec"]


class SwiGLUSpec(GatedSpec):
    """Gated feed-forward with silu on the gate."""

    def act(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return ACTIVATIONS["silu"]
