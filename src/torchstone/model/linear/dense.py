"""The plain linear projection."""

from __future__ import annotations

from torchstone.model.linear import LinearSpec

__all__ = ["DenseSpec"]


class DenseSpec(LinearSpec):
    """Plain matrix product."""
