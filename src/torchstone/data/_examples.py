"""Examples that are found by their number, in the order that every split has.

B examples of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from torchstone.data.blocks import shuffled

if TYPE_CHECKING:
    import torch

    from torchstone.keys import Key

__all__ = ["Examples"]


class Examples:
    """One split; ``len(examples)`` counts them. A subclass has `_rows_of`.

    Attributes:
        bytes: 0: they are no whole texts, hence no bits per byte.
    """

    bytes = 0

    def __len__(self) -> int:
        raise NotImplementedError

    def _rows_of(self, number_B: np.ndarray) -> dict[str, torch.Tensor]:
        """The batch of the examples with these numbers."""
        raise NotImplementedError

    def batch(
        self, key: Key, step: int, size: int, micro: int = 0, accumulate: int = 1, rank: int = 0, ranks: int = 1
    ) -> dict[str, torch.Tensor]:
        """The micro-batch of one rank in one step, as `torchstone.data.Blocks.batch` orders them; what it holds is said
        by the class."""
        first = ((step * accumulate + micro) * ranks + rank) * size
        return self._rows_of(shuffled(len(self), key, first, size))

    def evaluation(self, size: int, limit: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Examples in order, in batches of `size`; with a `limit` that many, spread evenly."""
        count = len(self)
        total = count if limit is None else min(max(limit, 0), count)
        for start in range(0, total, size):
            yield self._rows_of(np.arange(start, min(start + size, total)) * count // total)
