"""Embedding: turns tokens, patches, frames or nodes into vectors.

Shapes: B rows, T tokens, D width, E width of the vectors (D, unless the spec says otherwise).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from torchstone.model.context import Context
from torchstone.model.site import Site
from torchstone.model.tokens import Tokens
from torchstone.spec import PartSpec, lazy_parts

__all__ = ["Embedding", "EmbeddingSpec"]

__getattr__ = lazy_parts(__name__)


class EmbeddingSpec(PartSpec):
    """What stands at the input."""

    family: ClassVar[str] = "embedding"
    default_kind: ClassVar[str] = "token"
    of_tokens: ClassVar[bool] = True
    """Whether its inputs are token ids, so that the model needs a vocabulary."""

    @property
    def count(self) -> int | None:
        """Tokens of one input, where all have the same number."""
        return None

    def table_width(self, width: int) -> int:
        """Width E of its vectors, to which positions are added, in a stream of `width`."""
        return width

    def build(self, site: Site, vocabulary: int | None) -> Embedding:
        """The module."""
        raise NotImplementedError


class Embedding(nn.Module):
    """What an embedding kind builds."""

    def table(self) -> torch.Tensor | None:
        """The matrix (V, E) that a tied head multiplies with, if there is one."""
        return None

    def tokens(self, inputs: Any) -> Tokens:
        """The tokens of `inputs`: which order, which padding.

        Raises:
            TorchstoneError: inputs of another shape or type than it takes.
        """
        raise NotImplementedError

    def forward(
        self,
        inputs: Any,
        tokens: Tokens,
        added: torch.Tensor | None,
        ctx: Context,
        embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The stream (B, T, D). `added` (B|1, T, E) are position embeddings, added before norm and dropout;
        `embeddings` (B, T, E) stand in the place of the looked-up vectors."""
        raise NotImplementedError
