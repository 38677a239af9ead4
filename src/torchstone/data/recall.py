"""Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): pairs of key and value, then keys to answer.

``k3 v7 k0 v2 k9 v5 | k9 [v5] k3 [v7]``: what stands in brackets is an answer. Keys differ within an example,
values need not. No key is asked twice, so the answers may stand in the sequence. The queries follow one another, where
the paper spreads them out.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field, model_validator

from torchstone.data._task import TaskSpec, below, choose

__all__ = ["RecallSpec"]


class RecallSpec(TaskSpec):
    """Associative recall: which value stood behind this key?"""

    paper: ClassVar[str] = "Arora et al. 2023, arXiv 2312.04927"

    pairs: int = Field(8, ge=1, le=2**12)
    """Pairs of key and value in an example."""
    queries: int = Field(4, ge=1, le=2**12)
    """Keys asked at the end of an example, each once."""
    keys: int = Field(32, ge=1, le=2**14)
    """Different keys: ids from 0."""
    values: int = Field(32, ge=2, le=2**14)
    """Different values: ids behind those of the keys."""

    @model_validator(mode="after")
    def _enough(self) -> RecallSpec:
        if self.pairs > self.keys:
            raise ValueError(f"{self.pairs} pairs need as many different keys, keys is {self.keys}")
        if self.queries > self.pairs:
            raise ValueError(f"{self.queries} queries need as many pairs, pairs is {self.pairs}")
        return self

    @property
    def vocabulary(self) -> int:
        return self.keys + self.values

    @property
    def block(self) -> int:
        return 2 * (self.pairs + self.queries) - 1

    @property
    def words(self) -> int:
        return self.keys + 2 * self.pairs

    def write(self, words_BW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        keys, values, asked = np.split(words_BW, [self.keys, self.keys + self.pairs], axis=1)
        pair_BP2 = np.stack([choose(keys, self.pairs), self.keys + below(values, self.values)], axis=2)
        query_BQ2 = np.take_along_axis(pair_BP2, choose(asked, self.queries)[:, :, None], axis=1)
        ids_BS = np.concatenate([pair_BP2, query_BQ2], axis=1).reshape(len(words_BW), -1)
        answer_BS = np.zeros(ids_BS.shape, bool)
        answer_BS[:, 2 * self.pairs + 1 :: 2] = True
        return ids_BS, answer_BS
