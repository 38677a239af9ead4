"""The copy task (Graves et al. 2014, arXiv 1410.5401): a random string, a separator, the same string.

``a d b d | [a] [d] [b] [d]``: what stands in brackets is an answer.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from torchstone.data._task import TaskSpec, below

__all__ = ["CopyingSpec"]


class CopyingSpec(TaskSpec):
    """Copying: write the string again."""

    paper: ClassVar[str] = "Graves et al. 2014, arXiv 1410.5401"

    length: int = Field(16, ge=1, le=2**18)
    """Symbols in the string."""
    symbols: int = Field(16, ge=2, le=2**16)
    """Different symbols: ids from 0; the separator is behind them."""

    @property
    def vocabulary(self) -> int:
        return self.symbols + 1

    @property
    def block(self) -> int:
        return 2 * self.length

    @property
    def words(self) -> int:
        return self.length

    def write(self, words_BW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        string_BL = below(words_BW, self.symbols)
        ids_BS = np.concatenate([string_BL, np.full((len(words_BW), 1), self.symbols), string_BL], axis=1)
        return ids_BS, np.broadcast_to(np.arange(self.block + 1) > self.length, ids_BS.shape)
