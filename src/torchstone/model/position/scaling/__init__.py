"""Scaling of rotary frequencies for contexts longer than those of training."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from torchstone.spec import PartSpec, lazy_parts

__all__ = ["ScalingSpec"]

__getattr__ = lazy_parts(__name__)


class ScalingSpec(PartSpec):
    """How rotary frequencies are stretched."""

    family: ClassVar[str] = "scaling"

    factor: float = Field(gt=0)
    """How many times longer the context is to be."""

    def stretch(self, frequencies: torch.Tensor, base: float, turned: int, context: int) -> tuple[torch.Tensor, float]:
        """New frequencies (R/2,) and a factor on queries and keys."""
        raise NotImplementedError
