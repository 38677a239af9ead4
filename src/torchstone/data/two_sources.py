"""Two sources at once (after Lamb et al. 2021, arXiv 2103.00336): a token is a pair of symbols of independent grammars.

    token = symbols * a + b,    and the next token is both next symbols

At each position one source is informative: its symbol is one of the `branches` successors that its grammar has for its
symbol before, each as likely. The other source's symbol is uniform over all. Which source is informative is not
written anywhere; it stays with probability `1 - switch`. Grammars are drawn once, by the task's seed: the examples of
all splits follow the same two.

B examples, S = T + 1 tokens, N symbols, K branches.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field, PrivateAttr, model_validator

from torchstone.data._task import TaskSpec, below, choose
from torchstone.data.hashing import mix

__all__ = ["TwoSourcesSpec"]


class TwoSourcesSpec(TaskSpec):
    """Two sources: both next symbols, where only one source at a time follows its grammar."""

    paper: ClassVar[str] = "Lamb et al. 2021, arXiv 2103.00336"

    length: int = Field(64, ge=1, le=2**16)
    """Pairs that the model reads."""
    symbols: int = Field(8, ge=2, le=2**8)
    """Symbols of each source."""
    branches: int = Field(2, ge=1, le=2**8)
    """Successors of a symbol in its source's grammar."""
    switch: float = Field(0.1, ge=0, le=1)
    """Probability that the other source becomes the informative one, at each position."""
    grammars: tuple[int, int] = (0, 0)
    """Numbers of the two sources' grammars: another number is another grammar of that source."""

    _marks: bool = PrivateAttr(False)
    """Whether `write` gives, in the answers' place, where the first source is informative."""

    @model_validator(mode="after")
    def _enough(self) -> TwoSourcesSpec:
        if self.branches > self.symbols:
            raise ValueError(f"{self.branches} branches need as many symbols, symbols is {self.symbols}")
        return self

    @property
    def vocabulary(self) -> int:
        return self.symbols**2

    @property
    def block(self) -> int:
        return self.length

    @property
    def words(self) -> int:
        return 3 * (self.length + 1)

    def grammar(self, source: int) -> np.ndarray:
        """Successors (N, K) of each symbol of source 0 or 1: different ones, int64."""
        key = self.key().fold("grammar", source, self.grammars[source])
        numbers = np.arange(self.symbols**2, dtype=np.uint64).reshape(self.symbols, -1)
        return choose(mix(numbers + np.uint64(key.value % 2**64)), self.branches)

    def write(self, words_BW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        switch_BS, *words_2BS = np.split(words_BW, 3, axis=1)
        turns_BS = switch_BS < np.uint64(min(int(self.switch * 2.0**64), 2**64 - 1))
        turns_BS[:, 0] = switch_BS[:, 0] % np.uint64(2) == 1  # either source is the first
        informs_BS = np.cumsum(turns_BS, axis=1) % 2 == 0
        ids_BS = np.zeros(informs_BS.shape, np.int64)
        for source, word_BS in enumerate(words_2BS):
            successors_NK = self.grammar(source)
            uniform_BS, branch_BS = below(word_BS, self.symbols), below(word_BS, self.branches)
            symbol_BS = uniform_BS.copy()
            for s in range(1, symbol_BS.shape[1]):
                ruled_B = informs_BS[:, s] if source == 0 else ~informs_BS[:, s]
                symbol_BS[ruled_B, s] = successors_NK[symbol_BS[ruled_B, s - 1], branch_BS[ruled_B, s]]
            ids_BS = ids_BS * self.symbols + symbol_BS
        return ids_BS, informs_BS if self._marks else np.ones(ids_BS.shape, bool)

    def informative(self, split: str, number_B: np.ndarray) -> np.ndarray:
        """Where the first source is the informative one, bool (B, S), in the same examples as `sequences` gives."""
        marking = self.model_copy()
        marking._marks = True
        return marking.sequences(split, number_B)[1]
