"""Layers that share nothing but their position modules."""

from __future__ import annotations

from torchstone.model.stack import StackSpec

__all__ = ["PlainSpec"]


class PlainSpec(StackSpec):
    """Layers one after another."""
