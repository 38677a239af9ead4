"""Pictures of two classes in one: mixup (Zhang et al. 2018, arXiv 1710.09412) and cutmix (Yun et al. 2019, arXiv
1905.04899).

    mixup:   x = s x_a + (1 - s) x_b,                            s ~ Beta(alpha, alpha)
    cutmix:  x = x_a with a rectangle of x_b, 1 - s of its area; s is the share that is left of x_a

of which the loss is s CE(y_a) + (1 - s) CE(y_b). One batch has one share, and picture b is picture a of the batch read
from its end, as in the published fine-tuning of BEiT; pictures without a label stay as they are.

B pictures, C channels, I pixels of a side.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from pydantic import Field

from torchstone.keys import Key
from torchstone.spec import Spec

__all__ = ["MixingSpec"]


class MixingSpec(Spec):
    """How pictures of a batch are mixed. By default they are not."""

    mixup: float = Field(0.0, ge=0, le=1000)
    """Both parameters of the Beta distribution of shares in mixup; 0 for none, 0.8 where BEiT is fine-tuned."""
    cutmix: float = Field(0.0, ge=0, le=1000)
    """The same in cutmix; 0 for none, 1 where BEiT is fine-tuned."""
    chance: float = Field(1.0, gt=0, le=1)
    """Share of batches that are mixed."""
    switch: float = Field(0.5, ge=0, le=1)
    """Share of the mixed batches that take cutmix, where both are on."""

    def draw(
        self, pixels_BCII: torch.Tensor, label_B: torch.Tensor, key: Key
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mixed pictures, the label (B,) of which each holds more, the label (B,) of which it holds less, and the share
        (B,) of the former, float32 from 0.5 to 1."""
        rng = key.numpy()
        whole = torch.ones(len(label_B), device=label_B.device)
        if not (self.mixup or self.cutmix) or rng.random() >= self.chance:
            return pixels_BCII, label_B, label_B, whole
        cuts = bool(self.cutmix) and (not self.mixup or rng.random() < self.switch)
        alpha = self.cutmix if cuts else self.mixup
        share = float(rng.beta(alpha, alpha))
        known = (label_B >= 0).nonzero()[:, 0]
        partner_B = torch.arange(len(label_B), device=label_B.device)
        partner_B[known] = known.flip(0)
        others_BCII = pixels_BCII[partner_B]
        if cuts:
            top, bottom, left, right = self._box(pixels_BCII.shape[-1], share, rng)
            mixed_BCII = pixels_BCII.clone()
            mixed_BCII[..., top:bottom, left:right] = others_BCII[..., top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / pixels_BCII.shape[-1] ** 2
        else:
            mixed_BCII = share * pixels_BCII + (1 - share) * others_BCII
        first, second = (label_B, label_B[partner_B]) if share >= 0.5 else (label_B[partner_B], label_B)
        return mixed_BCII, first, second, whole * max(share, 1 - share)

    @staticmethod
    def _box(side: int, share: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """First and last rows and columns of a square around a drawn pixel, as far as it lies in the picture."""
        half = int(side * math.sqrt(1 - share)) // 2
        y, x = rng.integers(side, size=2).tolist()
        return max(0, y - half), min(side, y + half), max(0, x - half), min(side, x + half)
