"""Dyck-k with bounded depth (Hewitt et al. 2020, arXiv 2010.07515): balanced strings of k kinds of brackets.

``( < [>] < [>] [)]``: every closing bracket is an answer, for what is open says which it is; whether a bracket opens or
closes is chance, and not asked. At each step a fair coin opens or closes, unless nothing is open, the depth is reached,
or the rest is just long enough to close everything.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field, model_validator

from torchstone.data._task import TaskSpec, below

__all__ = ["DyckSpec"]


class DyckSpec(TaskSpec):
    """Dyck-k: which bracket closes here?"""

    paper: ClassVar[str] = "Hewitt et al. 2020, arXiv 2010.07515"

    brackets: int = Field(4, ge=2, le=2**14)
    """Kinds of brackets (k): opening ones are the ids from 0, the closing one of i is k + i."""
    depth: int = Field(4, ge=1, le=2**14)
    """Brackets that may be open at once."""
    length: int = Field(32, ge=2, le=2**18)
    """Brackets in a string; even."""

    @model_validator(mode="after")
    def _balanced(self) -> DyckSpec:
        if self.length % 2:
            raise ValueError(f"length {self.length} is odd, and a balanced string is even")
        if self.depth > self.length // 2:
            raise ValueError(f"depth {self.depth} cannot be reached in length {self.length}, {self.length // 2} can")
        return self

    @property
    def vocabulary(self) -> int:
        return 2 * self.brackets

    @property
    def block(self) -> int:
        return self.length - 1

    @property
    def words(self) -> int:
        return 2 * self.length

    def write(self, words_BW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = np.arange(len(words_BW))
        coin_BS = below(words_BW[:, : self.length], 2) == 1
        kind_BS = below(words_BW[:, self.length :], self.brackets)
        ids_BS = np.empty((len(words_BW), self.length), np.int64)
        stack_BH, height_B = np.zeros((len(words_BW), self.depth), np.int64), np.zeros(len(words_BW), np.int64)
        for s in range(self.length):
            may = (height_B < self.depth) & (height_B < self.length - s)
            opens = may & (coin_BS[:, s] | (height_B == 0))
            ids_BS[:, s] = np.where(opens, kind_BS[:, s], self.brackets + stack_BH[rows, height_B - 1])
            stack_BH[rows[opens], height_B[opens]] = kind_BS[opens, s]
            height_B += np.where(opens, 1, -1)
        return ids_BS, ids_BS >= self.brackets
