"""Adapting a model that exists: which of its parameters train, what is put beside them, and what is put before its
inputs."""

from __future__ import annotations

from torchstone.adapt.structured_prompting import StructuredPrompt
from torchstone.recipe import AdaptSpec
from torchstone.spec import lazy_parts

__all__ = ["AdaptSpec", "StructuredPrompt"]

__getattr__ = lazy_parts(__name__)
