"""Induction (Olsson et al. 2022, arXiv 2209.11895): ``... A B ... A [B]``.

The trigger A is drawn for each example from the same symbols as everything else, and stands in it exactly twice: once
somewhere with its successor, and at the end. So nothing marks the place but the token itself.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from torchstone.data._task import TaskSpec, below

__all__ = ["InductionSpec"]


class InductionSpec(TaskSpec):
    """Induction: what followed this token before?"""

    paper: ClassVar[str] = "Olsson et al. 2022, arXiv 2209.11895"

    length: int = Field(32, ge=3, le=2**18)
    """Tokens that the model reads, both triggers included."""
    symbols: int = Field(32, ge=3, le=2**16)
    """Different tokens."""

    @property
    def vocabulary(self) -> int:
        return self.symbols

    @property
    def block(self) -> int:
        return self.length

    @property
    def words(self) -> int:
        return self.length + 1

    def write(self, words_BW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = np.arange(len(words_BW))
        trigger_B, place_B = below(words_BW[:, 0], self.symbols), below(words_BW[:, 1], self.length - 2)
        ids_BS = np.empty((len(words_BW), self.length + 1), np.int64)
        others_BN = below(words_BW[:, 2:], self.symbols - 1)
        ids_BS[:, : self.length - 1] = others_BN + (others_BN >= trigger_B[:, None])  # any symbol but the trigger
        ids_BS[rows, place_B] = ids_BS[:, self.length - 1] = trigger_B
        ids_BS[:, self.length] = ids_BS[rows, place_B + 1]
        return ids_BS, np.broadcast_to(np.arange(self.length + 1) == self.length, ids_BS.shape)
