"""Text read in order, for models that carry something from batch to batch: every row of a batch is a stream.

Documents are cut into segments of one length; the last one of a document is padded. An epoch puts the documents into an
order of its own and deals the segments in that order out to the rows, an equal run of them each. So a row reads a
document from beginning to end, step by step, and then the next one; only where a run begins may it be inside of one.
``begins`` says where what a row carries is to be forgotten.

B rows, T tokens of a segment, D documents, N segments of a split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from torchstone.data.blocks import IGNORE, Blocks, shuffled
from torchstone.data.text import TextDataSpec
from torchstone.errors import TorchstoneError

if TYPE_CHECKING:
    import torch

    from torchstone.data.prepare import Prepared
    from torchstone.keys import Key

__all__ = ["Documents", "DocumentsDataSpec"]


class DocumentsDataSpec(TextDataSpec):
    """Text from a corpus, read in order: a row of a batch reads one document after another, segment by segment."""

    forget: Literal["document", "segment"] = "document"
    """Where a row forgets what it carries: at the end of a document, or after every segment, so that nothing is."""

    def prepare(self, progress: Callable[[str], None] | None = None) -> Prepared:
        prepared = super().prepare(progress)
        train, valid, test = (
            Documents(split, self.forget == "segment") for split in (prepared.train, prepared.valid, prepared.test)
        )
        return replace(prepared, train=train, valid=valid, test=test)


class Documents(Blocks):
    """The segments of one split; ``len(documents)`` counts them.

    Attributes:
        block: tokens in a segment (T).
        tokens, bytes, documents: as of `Blocks`; every token but the split's first is a target once.
    """

    def __init__(self, blocks: Blocks, always: bool = False) -> None:
        vars(self).update(vars(blocks))
        self._always = always
        ends_D = np.append(self._starts[1:], self.tokens)[: self.documents]
        self._count_D = -(-(ends_D - self._starts) // self.block)
        self._first_D = np.cumsum(self._count_D) - self._count_D
        self._ends_D = ends_D
        self._epoch: tuple[Key, int, np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self._count_D.sum())

    def batch(
        self, key: Key, step: int, size: int, micro: int = 0, accumulate: int = 1, rank: int = 0, ranks: int = 1
    ) -> dict[str, torch.Tensor]:
        """The micro-batch of one rank in one step, a pure function of its arguments; row b goes on where row b of the
        step before it ended. What is left of an epoch when all rows have read the same number of segments is left out.

        Returns:
            ``ids`` int64 (B, T); ``next`` int64 (B, T), -100 where the segment or the split ends; ``valid`` bool
            (B, T), False where a segment is padded; ``begins`` bool (B,), whether a row forgets what it carries before
            it reads this; ``example`` int64 (B,), numbers of segments.

        Raises:
            TorchstoneError: the split has fewer segments than a step has rows.
        """
        rows = size * accumulate * ranks
        steps = len(self) // rows
        if not steps:
            raise TorchstoneError(
                f"the {self.split} split has {len(self)} segments of {self.block} tokens, a step reads {rows}"
            )
        row_B = (micro * ranks + rank) * size + np.arange(size)
        order_N = self._order(key, step // steps)
        return self._read(order_N[row_B * steps + step % steps], np.full(size, step % steps == 0))

    def _order(self, key: Key, epoch: int) -> np.ndarray:
        """Numbers of all segments in the order of an epoch, int64 (N,)."""
        if self._epoch is None or self._epoch[:2] != (key, epoch):
            document_D = shuffled(self.documents, key, epoch * self.documents, self.documents)
            self._epoch = key, epoch, self._segments(document_D)
        return self._epoch[2]

    def _segments(self, document_D: np.ndarray) -> np.ndarray:
        count_D = self._count_D[document_D]
        within_N = np.arange(count_D.sum()) - np.repeat(np.cumsum(count_D) - count_D, count_D)
        return np.repeat(self._first_D[document_D], count_D) + within_N

    def evaluation(self, size: int, limit: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Every document whole, by the row that is free first; rows without any left get padding.

        Args:
            size: rows of a batch.
            limit: at most that many segments, of documents spread evenly over the split.
        """
        total = len(self)
        count, most = self.documents, total
        if limit is not None and limit < total:
            count, most = max(1, self.documents * limit // total), max(limit, 1)
        size = min(size, count)
        rows: list[list[int]] = [[] for _ in range(size)]
        for document in np.arange(count) * self.documents // count:
            mine = self._segments(np.array([document]))
            min(rows, key=len).extend(mine[:most].tolist())
            most -= len(mine)
            if most <= 0:
                break
        for step in range(max(map(len, rows))):
            yield self._read(np.array([row[step] if step < len(row) else -1 for row in rows]), np.full(size, step == 0))

    def documents_of(self, block_B: np.ndarray) -> np.ndarray:
        """The number of the document that each segment belongs to, for each of its targets, int64 (B, T)."""
        document_B = np.searchsorted(self._first_D, np.maximum(block_B, 0), side="right") - 1
        return np.repeat(document_B[:, None], self.block, 1)

    def _read(self, segment_B: np.ndarray, begins_B: np.ndarray) -> dict[str, torch.Tensor]:
        import torch

        shape = (len(segment_B), self.block)
        ids_BT, next_BT, valid_BT = np.full(shape, self._pad), np.full(shape, IGNORE), np.zeros(shape, bool)
        document_B = np.searchsorted(self._first_D, np.maximum(segment_B, 0), side="right") - 1
        for row, (segment, document) in enumerate(zip(segment_B, document_B, strict=True)):
            if segment < 0:
                continue
            low = self._starts[document] + (segment - self._first_D[document]) * self.block
            high = min(low + self.block, self._ends_D[document])
            text = self._stream[low : high + 1].astype(np.int64)
            inputs, targets = text[: high - low], text[1:]
            ids_BT[row, : len(inputs)], next_BT[row, : len(targets)] = inputs, targets
            valid_BT[row, : len(inputs)] = True
        begins_B = begins_B | (segment_B == self._first_D[document_B]) | (segment_B < 0) | self._always
        rows = {"ids": ids_BT, "next": next_BT, "valid": valid_BT, "begins": begins_B, "example": segment_B}
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in rows.items()}
