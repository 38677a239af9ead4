"""Adapting a model that exists: which of its parameters train, and what is put beside them."""

from __future__ import annotations

from torchstone.recipe import AdaptSpec
from torchstone.spec import lazy_parts

__all__ = ["AdaptSpec"]

__getattr__ = lazy_parts(__name__)
