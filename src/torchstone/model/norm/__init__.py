"""Norm: brings the scale of a vector back to one."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import nn

from torchstone.spec import PartSpec, lazy_parts

__all__ = ["NormSpec"]

__getattr__ = lazy_parts(__name__)


class NormSpec(PartSpec):
    """A normalisation over the last axis."""

    family: ClassVar[str] = "norm"
    default_kind: ClassVar[str] = "rmsnorm"

    eps: float = Field(1e-5, gt=0, le=1)
    """Added to the variance (or mean square) before the root."""

    def build(self, width: int) -> nn.Module:
        """A module that maps (..., width) to (..., width)."""
        raise NotImplementedError
