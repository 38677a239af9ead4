"""Which patches of a picture are hidden: blocks (Bao et al. 2022, arXiv 2106.08254, algorithm 1), or single patches.

Blocks are put in until the target n is met or ten tries in a row add nothing:

    area s ~ U(s_min, n - count),  aspect r ~ exp U(ln a, ln b),  h = round(sqrt(s r)),  w = round(sqrt(s / r))

at a random place, where h and w are below the sides of the grid, and only if they add from 1 to n - count patches. So
a mask is a union of rectangles and may fall short of n, as in the published code; it never exceeds it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from pydantic import Field, model_validator

from torchstone.keys import Key
from torchstone.spec import Spec

__all__ = ["MaskSpec"]

_TRIES = 10


class MaskSpec(Spec):
    """How many patches of a picture are hidden, and in which shape."""

    ratio: float = Field(0.4, gt=0, lt=1)
    """Share of the patches that is hidden, at most; BEiT has 75 of 196."""
    blocks: bool = True
    """Hide rectangles; otherwise single patches, exactly as many as the share says."""
    min_patches: int = Field(16, ge=1)
    """Least area of a rectangle when it is drawn."""
    aspect: tuple[float, float] = (0.3, 1 / 0.3)
    """Least and largest height over width of a rectangle."""

    @model_validator(mode="after")
    def _ordered(self) -> MaskSpec:
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"aspect: {self.aspect[0]:g} to {self.aspect[1]:g} is no range above 0")
        return self

    def target(self, side: int) -> int:
        """Patches of a grid of `side` that are hidden, at most."""
        return int(self.ratio * side**2)

    def illegal(self, side: int) -> str | None:
        """Why a grid of `side` patches cannot be masked like this, or None."""
        target = self.target(side)
        if not target:
            return f"mask.ratio: {self.ratio:g} of {side} x {side} patches is none"
        if self.blocks and self.min_patches > target:
            return f"mask.min_patches: {self.min_patches} are more than the {target} patches that are hidden"
        return None

    def draw(self, rows: int, side: int, key: Key) -> torch.Tensor:
        """Masks of so many pictures, bool (rows, side, side), True where a patch is hidden."""
        generator = key.numpy()
        if self.blocks:
            return torch.from_numpy(np.stack([self._blocks(side, generator) for _ in range(rows)]))
        hidden = np.zeros((rows, side * side), bool)
        for row in hidden:
            row[generator.permutation(side * side)[: self.target(side)]] = True
        return torch.from_numpy(hidden.reshape(rows, side, side))

    def _blocks(self, side: int, generator: np.random.Generator) -> np.ndarray:
        hidden, target = np.zeros((side, side), bool), self.target(side)
        low, high = (math.log(bound) for bound in self.aspect)
        count = 0
        while count < target:
            left = target - count
            for _ in range(_TRIES):
                # near the end of the target the bounds change places, as in the published code
                area = self.min_patches + (left - self.min_patches) * generator.random()
                aspect = math.exp(generator.uniform(low, high))
                h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if not (0 < h < side and 0 < w < side):
                    continue
                top, start = generator.integers(side - h + 1), generator.integers(side - w + 1)
                block = hidden[top : top + h, start : start + w]
                new = block.size - int(block.sum())
                if 0 < new <= left:
                    block[:] = True
                    count += new
                    break
            else:
                break
        return hidden
