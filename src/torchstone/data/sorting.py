"""Sorting: a list, a separator, the list in ascending order.

``7 2 9 2 | [2] [2] [7] [9]``: what stands in brackets is an answer. Numbers may repeat.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from torchstone.data._task import TaskSpec, below

__all__ = ["SortingSpec"]


class SortingSpec(TaskSpec):
    """Sorting: write the list in ascending order."""

    length: int = Field(8, ge=2, le=2**18)
    """Numbers in the list."""
    symbols: int = Field(32, ge=2, le=2**16)
    """Different numbers: ids from 0, which are their order; the separator is behind them."""

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
        list_BL = below(words_BW, self.symbols)
        separator_B1 = np.full((len(words_BW), 1), self.symbols)
        ids_BS = np.concatenate([list_BL, separator_B1, np.sort(list_BL, axis=1)], axis=1)
        return ids_BS, np.broadcast_to(np.arange(self.block + 1) > self.length, ids_BS.shape)
