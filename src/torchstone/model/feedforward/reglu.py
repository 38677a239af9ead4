"""ReGLU (Shazeer 2020, arXiv 2002.05202, eq. 6): a gate with relu, or with its square, as BitNet b1.58 2B4T has it (Ma
et al. 2025, arXiv 2504.12285)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from torchstone.model.feedforward import ACTIVATIONS
from torchstone.model.feedforward._gated import GatedSpec

__all__ = ["ReGLUSpec"]


class ReGLUSpec(GatedSpec):
    """Gated feed-forward with relu on the gate."""

    activation: Literal["relu", "relu2"] = "relu"
    """relu, or its square."""

    def act(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return ACTIVATIONS[self.activation]
