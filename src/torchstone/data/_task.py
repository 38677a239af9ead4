"""Synthetic tasks: what every kind of them shares.

An example is a sequence of S = T + 1 tokens of the task's own vocabulary, some of which are answers. A model reads the
first T and is trained and scored on the answers alone. Examples are pure functions of the task's fields, the split and
their number, so nothing is stored. Train is endless; valid and test are `examples` fixed ones each.

Splits are disjoint by construction: a hash of its tokens says which split a sequence belongs to (an eighth each to
valid and test), and a number whose draw belongs elsewhere is drawn again. `modular` divides all its pairs instead.

B examples, T tokens that the model reads, S = T + 1, W random words.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from torchstone.data._examples import Examples
from torchstone.data.blocks import IGNORE
from torchstone.data.hashing import digest, mix
from torchstone.data.spec import DataSpec
from torchstone.errors import TorchstoneError
from torchstone.keys import Key

if TYPE_CHECKING:
    import torch

__all__ = ["PreparedTask", "TaskSpec", "TaskSplit", "below", "choose"]

_FORMAT = 1
"""Goes up whenever the same fields would give other examples."""
_ENDLESS = 1 << 40
"""Training examples of a task that nobody runs out of."""
_ATTEMPTS = 500
"""Draws for one example. Where an eighth of all sequences is its split's, this many fail with probability 1e-29."""
_REHEARSED = 1 << 14
"""Tokens of each split that are drawn beforehand, so that a task with too few sequences is refused."""
_STEP = np.uint64(0x9E3779B97F4A7C15)


class TaskSpec(DataSpec):
    """A synthetic task. Kinds say `vocabulary`, `block`, `words` and `write`, or `sequences` outright."""

    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the examples. The trainer's seed only orders those of train, so that trainings share valid and test."""
    examples: int = Field(512, ge=1, le=2**20)
    """Examples in valid, and in test."""

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        raise NotImplementedError

    @property
    def block(self) -> int:
        """Tokens of an example that the model reads (T)."""
        raise NotImplementedError

    @property
    def words(self) -> int:
        """Random words that one example takes (W)."""
        raise NotImplementedError

    def write(self, words_BW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sequences from independent uniform uint64: ids, int64 (B, S), and where the answers are, bool (B, S)."""
        raise NotImplementedError

    def size(self, split: str) -> int:
        """Number of examples of a split."""
        return _ENDLESS if split == "train" else self.examples

    def sequences(self, split: str, number_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What `write` gives for these examples of a split.

        Raises:
            TorchstoneError: the task has too few different sequences to have any of this split.
        """
        shape = len(number_B), self.block + 1
        ids_BS, answer_BS = np.empty(shape, np.int64), np.empty(shape, bool)
        todo = np.arange(len(number_B))
        for attempt in range(_ATTEMPTS):
            key = self.key().fold(split, attempt)
            ids, answer = self.write(_words(key, number_B[todo], self.words))
            mine = _belongs(ids, split)
            ids_BS[todo[mine]], answer_BS[todo[mine]] = ids[mine], answer[mine]
            todo = todo[~mine]
            if not len(todo):
                return ids_BS, answer_BS
        raise TorchstoneError(
            f"data {self.kind}: has too few different examples for three splits, none of {_ATTEMPTS} draws is of "
            f"{split}; make the task larger"
        )

    def key(self) -> Key:
        """What every draw of this task is made from."""
        return Key(self.seed).fold("task", self.kind)

    def prepare(self, progress: Callable[[str], None] | None = None) -> PreparedTask:
        """The splits; nothing is written.

        Raises:
            TorchstoneError: the task has too few different examples for three splits.
        """
        splits = {name: TaskSplit(self, name) for name in ("train", "valid", "test")}
        for name, split in splits.items():
            self.sequences(name, np.arange(min(len(split), 1 + _REHEARSED // self.block)))
        size = self.size("train")
        description = (
            f"{self.kind}: {self.block:,} tokens an example, vocabulary {self.vocabulary:,}; "
            f"train {'endless' if size == _ENDLESS else f'{size:,}'}, valid and test {self.examples:,} each"
        )
        content = digest(_FORMAT, json.dumps(self.dump(), sort_keys=True))
        return PreparedTask(splits["train"], splits["valid"], splits["test"], description, content)


class TaskSplit(Examples):
    """The examples of one split; ``len(split)`` counts them.

    A batch holds ``ids`` int64 (B, T); ``next`` int64 (B, T), the token after each where that is an answer, else -100;
    ``example`` int64 (B,), numbers of the examples.

    Attributes:
        block: tokens of an example that the model reads (T).
        tokens: of all examples.
    """

    def __init__(self, spec: TaskSpec, split: str) -> None:
        self._spec, self._split = spec, split
        self.block = spec.block
        self.tokens = len(self) * self.block

    def __len__(self) -> int:
        return self._spec.size(self._split)

    def score(
        self, predicted_BT: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Sum and count of ``accuracy``, over answers, and of ``exact``, over examples all of whose answers are right.

        Args:
            predicted_BT: the likeliest next tokens, int64.
            batch: as `evaluation` yields them.
        """
        there_BT = batch["next"] >= 0
        right_BT = there_BT & (predicted_BT == batch["next"])
        exact_B = (right_BT == there_BT).all(1)
        return {
            "accuracy": (right_BT.sum(), there_BT.sum()),
            "exact": (exact_B.sum(), there_BT.any(1).sum()),
        }

    def _rows_of(self, number_B: np.ndarray) -> dict[str, torch.Tensor]:
        import torch

        ids_BS, answer_BS = self._spec.sequences(self._split, number_B)
        rows = {
            "ids": ids_BS[:, :-1],
            "next": np.where(answer_BS, ids_BS, IGNORE)[:, 1:],
            "example": number_B,
        }
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in rows.items()}


@dataclass(frozen=True)
class PreparedTask:
    """A task, ready to train on. Its ids are no text, so there is no tokenizer.

    Attributes:
        train, valid, test: the splits.
        description: one line: sizes of the task and of its splits.
        hash: identifies the examples; numbers of different hashes do not compare.
    """

    train: TaskSplit
    valid: TaskSplit
    test: TaskSplit
    description: str
    hash: str
    tokenizer: None = None


def below(words: np.ndarray, size: int) -> np.ndarray:
    """Uniform int64 in [0, size) from uniform uint64; what the remainder favours is below 2^-40."""
    return (words % np.uint64(size)).astype(np.int64)


def choose(words_BN: np.ndarray, count: int) -> np.ndarray:
    """`count` different ones of range(N), in random order, int64 (B, count)."""
    return np.argsort(words_BN, axis=1, kind="stable")[:, :count]


def _words(key: Key, number_B: np.ndarray, count: int) -> np.ndarray:
    """Uniform uint64 (B, W): a stream of splitmix64 for each example."""
    start_B = mix(number_B.astype(np.uint64) ^ np.uint64(key.value & (2**64 - 1)))
    return mix(start_B[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _STEP)


def _belongs(ids_BS: np.ndarray, split: str) -> np.ndarray:
    """Whether each sequence is of this split, by a hash of its tokens."""
    salt_S = mix(np.arange(1, ids_BS.shape[1] + 1, dtype=np.uint64) * _STEP)
    slot_B = mix(mix(salt_S + ids_BS.astype(np.uint64)).sum(1, dtype=np.uint64)) >> np.uint64(61)
    if split == "train":
        return slot_B > 1
    return slot_B == (0 if split == "valid" else 1)
