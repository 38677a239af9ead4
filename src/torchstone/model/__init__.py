"""The backbone: one Transformer made of swappable parts."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from torchstone.spec import PartSpec

__all__ = ["ModelSpec"]


class ModelSpec(PartSpec):
    """What is trained. `transformer` is the backbone; domains add models of other shapes."""

    family: ClassVar[str] = "model"
    default_kind: ClassVar[str] = "transformer"
    example: ClassVar[str | None] = None
    """What an example is made of, as `torchstone.data.DataSpec.example`; None where fields decide, as those of the
    backbone do."""

    def build(self) -> nn.Module:
        """The module, on the current default device, its parameters not yet initialised."""
        raise NotImplementedError
