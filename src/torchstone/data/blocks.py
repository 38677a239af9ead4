"""`Blocks`: a split's tokens as training batches.

The documents of a split, each behind a separator, are one stream of tokens in a memory-mapped file. Block i holds
tokens i T to (i + 1) T as inputs; its targets are shifted by one. Which blocks a batch holds is a pure function of a
key and the step, so any step can be had again at no cost: after a crash, on other ranks, on another machine.

B batch, T tokens of a block, N samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from torchstone.data.hashing import permute
from torchstone.errors import TorchstoneError

if TYPE_CHECKING:
    import torch

    from torchstone.keys import Key

__all__ = ["Blocks", "shuffled"]

IGNORE = -100
"""Target where there is nothing to predict."""


class Blocks:
    """The blocks of one split; ``len(blocks)`` counts the full ones.

    Attributes:
        tokens: of the split, with one separator for each document.
        bytes: UTF-8 bytes of the split's text. Loss summed over all targets / bytes / ln 2 is bits per byte.
        documents: number of documents.
        block: tokens in a block (T).
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: str,
        tokens: int,
        bytes: int,
        documents: int,
        block: int,
        separate: bool,
        pad: int,
    ) -> None:
        self.split, self.tokens, self.bytes, self.documents, self.block = split, tokens, bytes, documents, block
        self._separate, self._pad = separate, pad
        self._stream = _map(folder / f"{split}.tokens", dtype, tokens)
        self._starts = _map(folder / f"{split}.starts", "<i8", documents)

    def __len__(self) -> int:
        return self.tokens // self.block

    def batch(
        self, key: Key, step: int, size: int, micro: int = 0, accumulate: int = 1, rank: int = 0, ranks: int = 1
    ) -> dict[str, torch.Tensor]:
        """The micro-batch of one rank in one step: a pure function of its arguments.

        Every epoch visits each full block once, in an order of its own. k micro-batches of b rows hold the same rows in
        the same order as one batch of k b rows.

        Args:
            key: names the order.
            step: from 0; goes on over epochs.
            size: rows of this micro-batch (B).
            micro: number of this micro-batch, of `accumulate` in a step.
            rank: number of this process, of `ranks` that share a step.

        Returns:
            ``ids`` int64 (B, T); ``next`` int64 (B, T), the token after each, -100 where the stream ends; ``start``
            int64 (B, T), index within the block where each token's document starts, 0 if it started before (absent
            where documents are not separated); ``example`` int64 (B,), block numbers, the same in every epoch.

        Raises:
            TorchstoneError: the split has no full block.
        """
        count = len(self)
        if not count:
            raise TorchstoneError(
                f"the {self.split} split is shorter than one block: {self.tokens:,} tokens, block {self.block:,}"
            )
        first = ((step * accumulate + micro) * ranks + rank) * size
        return self.rows(shuffled(count, key, first, size))

    def rows(self, blocks: np.ndarray) -> dict[str, torch.Tensor]:
        """The blocks of these numbers, as of `batch`."""
        return _tensors(self._rows(blocks))

    def evaluation(self, size: int, limit: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """All blocks in order, the short one at the end too: every token but the first is predicted exactly once.

        Args:
            size: rows of a batch; the last may have fewer.
            limit: at most that many blocks, spread evenly over the split.

        Yields:
            What `batch` returns and ``valid`` bool (B, T): False where the short block is padded.
        """
        # A rest of one token is an input without a target: the last full block has predicted it.
        count = len(self) + (self.tokens % self.block > 1)
        blocks = np.arange(count)
        if limit is not None and limit < count:
            blocks = blocks[: max(limit, 0)] * count // max(limit, 1)
        for start in range(0, len(blocks), size):
            some = blocks[start : start + size]
            rows = self._rows(some)
            rows["valid"] = some[:, None] * self.block + np.arange(self.block) < self.tokens
            yield _tensors(rows)

    def documents_of(self, block_B: np.ndarray) -> np.ndarray:
        """The number of the document that each target of these blocks belongs to, int64 (B, T)."""
        target_BT = block_B[:, None] * self.block + np.arange(1, self.block + 1)
        return np.maximum(np.searchsorted(self._starts, target_BT, side="right") - 1, 0)

    def _rows(self, blocks: np.ndarray) -> dict[str, np.ndarray]:
        shape = (len(blocks), self.block)
        ids_BT, next_BT, start_BT = np.full(shape, self._pad), np.full(shape, IGNORE), np.zeros(shape, np.int64)
        for row, number in enumerate(blocks):
            low = int(number) * self.block
            text = self._stream[low : low + self.block + 1].astype(np.int64)
            inputs, targets = text[: self.block], text[1:]
            ids_BT[row, : len(inputs)] = inputs
            next_BT[row, : len(targets)] = targets
            if self._separate:
                first, last = np.searchsorted(self._starts, (low, low + self.block))
                begins = self._starts[first:last] - low
                start_BT[row, begins] = begins
        if self._separate:
            np.maximum.accumulate(start_BT, axis=1, out=start_BT)
        rows = {"ids": ids_BT, "next": next_BT, "example": np.asarray(blocks, np.int64)}
        return {**rows, "start": start_BT} if self._separate else rows


def shuffled(count: int, key: Key, first: int, size: int) -> np.ndarray:
    """Places `first` to `first` + `size` of an endless order in which every epoch visits `count` things once: int64."""
    order_N = first + np.arange(size)
    number_N = np.empty(size, np.int64)
    for epoch in np.unique(order_N // count):
        here = order_N // count == epoch
        number_N[here] = permute(order_N[here] % count, count, key.fold("epoch", int(epoch)))
    return number_N


def _map(path: Path, dtype: str, length: int) -> np.ndarray:
    # An empty file cannot be mapped. A plain view: slices of np.memmap are slow to make.
    return np.asarray(np.memmap(path, np.dtype(dtype), "r", shape=(length,))) if length else np.empty(0, dtype)


def _tensors(rows: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    import torch

    return {name: torch.from_numpy(array) for name, array in rows.items()}
