"""Two views of one picture: what the encoder sees and what the tokenizer sees (Bao et al. 2022, arXiv 2106.08254,
sections 2.1 and 3.1).

Both are of one crop, mirrored or not, in colours changed alike, each at a size of its own, so that patch i of one shows
what token i of the other stands for. In evaluation a view is the whole picture.

B pictures, C channels, I pixels of a side; values from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field

from torchstone.keys import Key
from torchstone.spec import Spec

__all__ = ["ViewsSpec"]

_TRIES, _ASPECT = 10, (3 / 4, 4 / 3)
_GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in brightness."""


class ViewsSpec(Spec):
    """How pictures vary from epoch to epoch. By default they do not."""

    crop: float | None = Field(None, gt=0, le=1)
    """Least share of a picture's area that a random crop keeps; null takes whole pictures. 0.08 in BEiT."""
    flip: bool = False
    """Mirror half of the pictures."""
    jitter: float = Field(0.0, ge=0, lt=1)
    """By how much brightness, contrast and saturation vary, each by a factor from 1 - jitter to 1 + jitter. 0.4 in
    BEiT."""

    def draw(
        self, pixels_BCII: torch.Tensor, sizes: Sequence[int], key: Key | None, first: int = 0
    ) -> list[torch.Tensor]:
        """Views of these sides, (B, C, side, side) each. Without a key nothing is drawn; `first` is the number of the
        first picture."""
        plain = key is None or (self.crop is None and not self.flip and not self.jitter)
        if plain:
            return [_at_size(pixels_BCII, size) for size in sizes]
        assert key is not None
        found: list[list[torch.Tensor]] = []
        for number, x_CII in enumerate(pixels_BCII, first):
            generator = key.fold(number).generator()
            if self.jitter:
                x_CII = self._coloured(x_CII, generator)
            if self.crop is not None:
                top, left, h, w = self._box(x_CII.shape[-1], self.crop, generator)
                x_CII = x_CII[:, top : top + h, left : left + w]
            if self.flip and torch.rand((), generator=generator) < 0.5:
                x_CII = x_CII.flip(-1)
            found.append([_at_size(x_CII[None], size) for size in sizes])
        return [torch.cat(views) for views in zip(*found, strict=True)]

    def _coloured(self, x_CII: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        bright, contrast, saturated = (1 + self.jitter * (2 * torch.rand(3, generator=generator) - 1)).tolist()
        x_CII = (x_CII * bright).clamp(0, 1)
        grey_II = x_CII.mean(0)
        if len(x_CII) == 3:
            grey_II = (x_CII * x_CII.new_tensor(_GREY)[:, None, None]).sum(0)
        x_CII = (contrast * x_CII + (1 - contrast) * grey_II.mean()).clamp(0, 1)
        if len(x_CII) != 3:
            return x_CII
        grey_II = (x_CII * x_CII.new_tensor(_GREY)[:, None, None]).sum(0)
        return (saturated * x_CII + (1 - saturated) * grey_II).clamp(0, 1)

    @staticmethod
    def _box(side: int, least: float, generator: torch.Generator) -> tuple[int, int, int, int]:
        """Top, left, height and width of a random crop; the whole picture where none of ten fits."""

        def uniform(low: float, high: float) -> float:
            return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))

        for _ in range(_TRIES):
            area, aspect = side**2 * uniform(least, 1), math.exp(uniform(*(math.log(each) for each in _ASPECT)))
            h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < h <= side and 0 < w <= side:
                top, left = (int(uniform(0, side - each + 1)) for each in (h, w))
                return min(top, side - h), min(left, side - w), h, w
        return 0, 0, side, side


def _at_size(x_BCHW: torch.Tensor, size: int) -> torch.Tensor:
    if x_BCHW.shape[-2:] == (size, size):
        return x_BCHW
    return F.interpolate(x_BCHW, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
