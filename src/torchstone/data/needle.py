"""A needle in a haystack (in the form of RULER's, Hsieh et al. 2024, arXiv 2404.06654): one statement in filler tokens.

``f f f k v f f f f k [v]``: the statement is a key and a value, the question is the key again, at the end. Where the
statement stands is drawn, evenly over all depths. It is the only one, so the distance is what is hard; for many
statements see `recall`.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from torchstone.data._task import TaskSpec, below

__all__ = ["NeedleSpec"]


class NeedleSpec(TaskSpec):
    """A needle in a haystack: find the one statement in filler tokens."""

    paper: ClassVar[str] = "Hsieh et al. 2024, arXiv 2404.06654"

    length: int = Field(128, ge=3, le=2**18)
    """Tokens that the model reads: filler, the statement's two, and the question."""
    fillers: int = Field(32, ge=1, le=2**16)
    """Different filler tokens: ids from 0."""
    keys: int = Field(16, ge=1, le=2**14)
    """Different keys: ids behind those of the filler."""
    values: int = Field(16, ge=2, le=2**14)
    """Different values: ids behind those of the keys."""

    @property
    def vocabulary(self) -> int:
        return self.fillers + self.keys + self.values

    @property
    def block(self) -> int:
        return self.length

    @property
    def words(self) -> int:
        return self.length + 2

    def write(self, words_BW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = np.arange(len(words_BW))
        key_B = self.fillers + below(words_BW[:, 0], self.keys)
        value_B = self.fillers + self.keys + below(words_BW[:, 1], self.values)
        depth_B = below(words_BW[:, 2], self.length - 2)
        ids_BS = np.empty((len(words_BW), self.length + 1), np.int64)
        ids_BS[:, : self.length - 1] = below(words_BW[:, 3:], self.fillers)
        ids_BS[rows, depth_B] = ids_BS[:, self.length - 1] = key_B
        ids_BS[rows, depth_B + 1] = ids_BS[:, self.length] = value_B
        return ids_BS, np.broadcast_to(np.arange(self.length + 1) == self.length, ids_BS.shape)
