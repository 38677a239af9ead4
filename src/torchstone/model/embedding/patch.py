"""Patch embeddings (Dosovitskiy et al. 2020, arXiv 2010.11929, eq. 1): an image cut into squares, each projected.

Shapes: B rows, C channels, I image side, P patch side, T = (I / P)^2 + 1 with a class token.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.model.context import Context
from torchstone.model.embedding import Embedding, EmbeddingSpec
from torchstone.model.site import Site
from torchstone.model.tokens import Tokens

__all__ = ["PatchEmbedding", "PatchSpec", "cut"]


def cut(x_BCII: torch.Tensor, P: int) -> torch.Tensor:
    """Patches (B, (I / P)^2, C * P * P) in reading order."""
    patches = x_BCII.unfold(2, P, P).unfold(3, P, P)  # (B, C, I/P, I/P, P, P)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


class PatchSpec(EmbeddingSpec):
    """Square patches of an image, linearly projected, with an optional class token in front."""

    of_tokens: ClassVar[bool] = False
    paper: ClassVar[str] = "Dosovitskiy et al. 2020, arXiv 2010.11929"

    image: int = Field(32, ge=1)
    """Side of the image in pixels, a multiple of `patch`."""
    patch: int = Field(4, ge=1)
    """Side of a patch in pixels."""
    channels: int = Field(3, ge=1)
    """Colour channels."""
    class_token: bool = True
    """Put a learned vector before the patches, for classification."""

    @property
    def count(self) -> int:
        """Tokens of one image."""
        return (self.image // self.patch) ** 2 + self.class_token

    def build(self, site: Site, vocabulary: int | None) -> Embedding:
        if self.image % self.patch:
            raise TorchstoneError(f"embedding.patch: {self.patch} does not divide an image of {self.image} pixels")
        return PatchEmbedding(self, site)


class PatchEmbedding(Embedding):
    """pixels (B, C, I, I) -> (B, T, D), patches in reading order."""

    def __init__(self, spec: PatchSpec, site: Site) -> None:
        super().__init__()
        self.spec, self.dropout, self.init = spec, site.dropout, site.init
        self.project = site.linear(spec.channels * spec.patch**2, site.width, "embed", bias=True)
        self.class_token = nn.Parameter(torch.empty(site.width)) if spec.class_token else None

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        self.init(parameter, "embed", generator)

    def tokens(self, inputs: Any) -> Tokens:
        side = self.spec.image
        wanted = (self.spec.channels, side, side)
        if not isinstance(inputs, torch.Tensor) or inputs.shape[1:] != wanted:
            got = tuple(inputs.shape) if isinstance(inputs, torch.Tensor) else type(inputs).__name__
            raise TorchstoneError(f"the model takes pixels of shape (rows, {', '.join(map(str, wanted))}), not {got}")
        return Tokens.blank(self.spec.count, inputs.device)

    def forward(
        self,
        inputs: Any,
        tokens: Tokens,
        added: torch.Tensor | None,
        ctx: Context,
        embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if embeddings is None:
            x_BTD = self.project(cut(inputs, self.spec.patch))
            if self.class_token is not None:
                first = self.class_token.to(x_BTD.dtype).expand(x_BTD.shape[0], 1, -1)
                x_BTD = torch.cat([first, x_BTD], 1)
        else:
            x_BTD = embeddings
        if added is not None:
            x_BTD = x_BTD + added.to(x_BTD.dtype)
        return ctx.drop(ctx.tap("embedding", x_BTD), self.dropout, "embedding")
