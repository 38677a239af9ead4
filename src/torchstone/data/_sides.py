"""Which split an example is in, decided by its content, for data whose examples are read whole."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchstone.data.corpora import document_digest
from torchstone.data.hashing import mix

__all__ = ["SPLITS", "sides"]

SPLITS = ("train", "valid", "test")
_BOUNDS = (0.9, 0.95)


def sides(texts: Sequence[str]) -> np.ndarray:
    """The number of each text's split, int64 (P,): 90, 5 and 5 %, equal texts on one side. Where that leaves a split
    (almost) empty, texts are taken in the order of their hashes."""
    if not texts:
        return np.empty(0, np.int64)
    content_P = np.array([int.from_bytes(document_digest(text.encode())[:8], "little") for text in texts], np.uint64)
    draw_P = (mix(content_P) >> np.uint64(11)) / 2.0**53  # as `torchstone.data.split` draws for a document
    side_P = np.searchsorted(_BOUNDS, draw_P, side="right")
    share = np.bincount(side_P, minlength=len(SPLITS)) / len(texts)
    if share[0] < 0.8 or share[1] < 0.01 or share[2] < 0.01:
        known, of_P = np.unique(draw_P, return_inverse=True)
        few = max(1, len(known) // 20) if len(known) > len(SPLITS) else 0
        side_P = np.searchsorted([len(known) - 2 * few, len(known) - few], of_P, side="right")
    return side_P
