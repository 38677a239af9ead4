"""Modular addition (Power et al. 2022, arXiv 2201.02177): ``a + b = [(a + b) mod p]``.

All p^2 ordered pairs are shuffled once by the task's seed and cut: the first `share` of them is train, the next
`examples` are valid, the next `examples` are test. As in the paper, (b, a) may be in train where (a, b) is not.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field, model_validator

from torchstone.data._task import TaskSpec
from torchstone.data.hashing import permute

__all__ = ["ModularSpec"]


class ModularSpec(TaskSpec):
    """Modular addition: the sum of two numbers modulo p."""

    paper: ClassVar[str] = "Power et al. 2022, arXiv 2201.02177"

    modulus: int = Field(97, ge=2, le=2**16)
    """p. Numbers are the ids from 0; plus and equals are behind them."""
    share: float = Field(0.5, gt=0, lt=1)
    """Share of all pairs that is train."""

    @model_validator(mode="after")
    def _enough(self) -> ModularSpec:
        train, pairs = self.size("train"), self.modulus**2
        if train < 1 or train + 2 * self.examples > pairs:
            raise ValueError(
                f"modulus {self.modulus} has {pairs:,} pairs, share {self.share:g} takes {train:,} for train, and "
                f"valid and test need {self.examples:,} each"
            )
        return self

    @property
    def vocabulary(self) -> int:
        return self.modulus + 2

    @property
    def block(self) -> int:
        return 4

    def size(self, split: str) -> int:
        return int(self.share * self.modulus**2) if split == "train" else self.examples

    def sequences(self, split: str, number_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        before = {"train": 0, "valid": self.size("train"), "test": self.size("train") + self.examples}[split]
        pair_B = permute(number_B + before, self.modulus**2, self.key().fold("pairs"))
        a_B, b_B = pair_B // self.modulus, pair_B % self.modulus
        plus_B, equals_B = np.full_like(a_B, self.modulus), np.full_like(a_B, self.modulus + 1)
        ids_BS = np.stack([a_B, plus_B, b_B, equals_B, (a_B + b_B) % self.modulus], axis=1)
        return ids_BS, np.broadcast_to(np.arange(5) == 4, ids_BS.shape)
