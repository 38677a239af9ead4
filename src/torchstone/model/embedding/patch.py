"""Patch embeddings (Dosovitskiy et al. 2020, arXiv 2010.11929, eq. 1): an image cut into squares, each projected.

Masked patches have one learned vector in the place of their own, before positions are added (BEiT, Bao et al. 2022,
arXiv 2106.08254, section 2.3).

Shapes: B rows, C channels, I image side, P patch side, N = (I / P)^2 patches, T = N + 1 with a class token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.model.context import Context
from torchstone.model.embedding import Embedding, EmbeddingSpec
from torchstone.model.site import Site
from torchstone.model.tokens import Tokens

__all__ = ["PatchEmbedding", "PatchSpec", "Patches", "cut"]


@dataclass(frozen=True)
class Patches:
    """What the embedding takes besides plain pixels.

    Attributes:
        pixels: (B, C, I, I).
        masked: (B, N), True where a patch is hidden.
    """

    pixels: torch.Tensor
    masked: torch.Tensor


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
    mask_token: bool = False
    """Have a learned vector for patches that are hidden."""
    mean: tuple[float, ...] = Field((0.0,), min_length=1)
    """Taken away from pixels, of each channel or of all."""
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field((1.0,), min_length=1)
    """What pixels are divided by then, of each channel or of all."""

    @model_validator(mode="after")
    def _sizes(self) -> PatchSpec:
        if self.image % self.patch:
            raise ValueError(f"patch: {self.patch} does not divide an image of {self.image} pixels")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name}: {len(values)} numbers for {self.channels} channels; give 1 or as many")
        return self

    @property
    def side(self) -> int:
        """Patches of a side."""
        return self.image // self.patch

    @property
    def count(self) -> int:
        return self.side**2 + self.class_token

    def build(self, site: Site, vocabulary: int | None) -> Embedding:
        return PatchEmbedding(self, site)


class PatchEmbedding(Embedding):
    """pixels (B, C, I, I), or `Patches` -> (B, T, D), patches in reading order."""

    def __init__(self, spec: PatchSpec, site: Site) -> None:
        super().__init__()
        self.spec, self.dropout, self.init = spec, site.dropout, site.init
        self.project = site.linear(spec.channels * spec.patch**2, site.width, "embed", bias=True)
        self.class_token = nn.Parameter(torch.empty(site.width)) if spec.class_token else None
        self.mask_token = nn.Parameter(torch.empty(site.width)) if spec.mask_token else None

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        self.init(parameter, "embed", generator)

    def tokens(self, inputs: Any) -> Tokens:
        side = self.spec.image
        wanted = (self.spec.channels, side, side)
        pixels = inputs.pixels if isinstance(inputs, Patches) else inputs
        if not isinstance(pixels, torch.Tensor) or pixels.shape[1:] != wanted:
            got = tuple(pixels.shape) if isinstance(pixels, torch.Tensor) else type(pixels).__name__
            raise TorchstoneError(f"the model takes pixels of shape (rows, {', '.join(map(str, wanted))}), not {got}")
        if isinstance(inputs, Patches):
            if self.mask_token is None:
                raise TorchstoneError("embedding patch: has no vector for masked patches; set embedding.mask_token")
            if inputs.masked.shape != (len(pixels), self.spec.side**2):
                raise TorchstoneError(
                    f"masked: needs shape {(len(pixels), self.spec.side**2)}, not {tuple(inputs.masked.shape)}"
                )
        return Tokens.blank(self.spec.count, pixels.device)

    def _projected(self, inputs: Any) -> torch.Tensor:
        """Patches as vectors (B, N, D), masked ones alike."""
        pixels, spec = inputs.pixels if isinstance(inputs, Patches) else inputs, self.spec
        if spec.mean != (0.0,) or spec.std != (1.0,):
            mean, std = (pixels.new_tensor(values)[:, None, None] for values in (spec.mean, spec.std))
            pixels = (pixels - mean) / std
        x_BND = self.project(cut(pixels, spec.patch))
        if isinstance(inputs, Patches) and self.mask_token is not None:
            x_BND = torch.where(inputs.masked[..., None], self.mask_token.to(x_BND.dtype), x_BND)
        return x_BND

    def forward(
        self,
        inputs: Any,
        tokens: Tokens,
        added: torch.Tensor | None,
        ctx: Context,
        embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if embeddings is None:
            x_BTD = self._projected(inputs)
            if self.class_token is not None:
                first = self.class_token.to(x_BTD.dtype).expand(x_BTD.shape[0], 1, -1)
                x_BTD = torch.cat([first, x_BTD], 1)
        else:
            x_BTD = embeddings
        if added is not None:
            x_BTD = x_BTD + added.to(x_BTD.dtype)
        return ctx.drop(ctx.tap("embedding", x_BTD), self.dropout, "embedding")
