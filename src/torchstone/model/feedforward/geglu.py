"""GeGLU (Shazeer 2020, arXiv 2002.05202, eq. 6): a gate with gelu."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from torchstone.model.feedforward import ACTIVATIONS
from torchstone.model.feedforward._gated import GatedSpec

__all__ = ["GeGLUSpec"]


class GeGLUSpec(GatedSpec):
    """Gated feed-forward with gelu on the gate."""

    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    """gelu exact, or by its tanh approximation as T5 v1.1 uses it."""

    def act(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return ACTIVATIONS[self.activation]
