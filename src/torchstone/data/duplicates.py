"""Near-duplicate documents, found by MinHash and locality-sensitive hashing (Broder 1997; Indyk and Motwani 1998).

A document is the set of its runs of five consecutive words. The share of equal entries in two signatures estimates the
Jaccard similarity of two such sets. Documents that agree in a whole band of the signature are compared, and joined if
the estimate is at least one half. Signatures live in a file: memory is some ten numbers a document, however long the
documents are. Words, not lines: in a text of twelve lines, one changed line would change a quarter of the runs of
three.

D documents, N units or shingles, S entries of a signature.
"""

from __future__ import annotations

import os
from array import array
from pathlib import Path
from types import TracebackType
from zlib import crc32

import numpy as np

from torchstone.data.hashing import mix

__all__ = ["Signatures"]

_BANDS, _ROWS = 16, 4  # a pair of similarity s is compared with probability 1 - (1 - s^4)^16: 0.64 at 0.5, 0.99 at 0.7
_SIZE = _BANDS * _ROWS
_SIMILAR = 0.5
_RUN = 5
"""Words in a shingle."""
_GAP = (0,) * (_RUN - 1)
"""Ends a document, so that its shingles do not reach into the next one."""
_BUFFER = 1 << 15
"""Shingles that are hashed at once."""
_COMPARED = 1 << 14
"""Pairs that are compared at once."""


class Signatures:
    """MinHash signatures of documents, in a temporary file, and the clusters that they form.

    Use: ``with Signatures(path) as signatures``, `add` each document, then `clusters`. The file is removed at the end.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "wb")  # noqa: SIM115 - closed in __exit__
        self._count = 0
        self._flat = array("I")
        self._lengths: list[int] = []
        random = np.random.Generator(np.random.Philox(20))
        self._multipliers = random.integers(1, 2**63, _SIZE, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

    def __enter__(self) -> Signatures:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        os.unlink(self._path)

    def add(self, raw: bytes) -> None:
        """Takes the next document, as UTF-8."""
        before = len(self._flat)
        self._flat.extend(map(crc32, raw.split()))
        if len(self._flat) == before:
            self._flat.append(0)
        self._lengths.append(len(self._flat) - before)
        self._flat.extend(_GAP)
        if len(self._flat) >= _BUFFER:
            self._flush()

    def _flush(self) -> None:
        if not self._lengths:
            return
        unit_N = np.array(self._flat, dtype=np.uint64)
        lengths = np.array(self._lengths)
        shingle_N = unit_N[: len(unit_N) - len(_GAP)]
        for step in range(1, _RUN):
            shingle_N = mix(shingle_N) + unit_N[step : len(unit_N) - len(_GAP) + step]
        shingle_N = mix(shingle_N)
        # A document of m words has m - 4 runs, one shorter than five words has one, filled up from the gap.
        kept, spans = np.maximum(lengths - len(_GAP), 1), lengths + len(_GAP)
        place_N = np.arange(len(unit_N)) - np.repeat(np.cumsum(spans) - spans, spans)
        shingle_N = shingle_N[(place_N < np.repeat(kept, spans))[: len(shingle_N)]]
        starts = np.cumsum(kept) - kept
        signature_DS = np.empty((len(lengths), _SIZE), np.uint32)
        for column, multiplier in enumerate(self._multipliers):
            signature_DS[:, column] = np.minimum.reduceat(shingle_N * multiplier >> np.uint64(32), starts)
        self._file.write(signature_DS.tobytes())  # not tofile, which hides why a write fails
        self._count += len(lengths)
        del self._flat[:]
        self._lengths = []

    def clusters(self) -> np.ndarray:
        """int64 (documents,): the cluster of each document, numbered from 0. Near-duplicates share one."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        self._flush()
        self._file.flush()
        count = self._count
        signature_DS = np.memmap(self._path, np.uint32, "r", shape=(count, _SIZE))
        label_D = np.arange(count)
        for band in range(_BANDS):
            key_D = np.zeros(count, np.uint64)
            for column in range(band * _ROWS, (band + 1) * _ROWS):
                key_D = mix(key_D + signature_DS[:, column])
            order = np.argsort(key_D, kind="stable")
            equal = key_D[order[1:]] == key_D[order[:-1]]
            # Each document is compared with its neighbour and with the first of those that share its band.
            first = np.maximum.accumulate(np.where(np.concatenate(([True], ~equal)), np.arange(count), 0))
            left = np.concatenate((order[:-1][equal], order[first[1:]][equal]))
            right = np.concatenate((order[1:][equal], order[1:][equal]))
            apart = label_D[left] != label_D[right]
            left, right = left[apart], right[apart]
            alike = np.zeros(len(left), bool)
            for start in range(0, len(left), _COMPARED):
                part = slice(start, start + _COMPARED)
                alike[part] = (signature_DS[left[part]] == signature_DS[right[part]]).mean(1) >= _SIMILAR
            if alike.any():
                edges = (label_D[left[alike]], label_D[right[alike]])
                graph = coo_array((np.ones(len(edges[0]), bool), edges), shape=(count, count))
                label_D = connected_components(graph, directed=False)[1].astype(np.int64)[label_D]
        return np.unique(label_D, return_inverse=True)[1]
