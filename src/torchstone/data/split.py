"""Train, valid and test: 90, 5 and 5 % of a corpus, decided by content, with near-duplicates on one side.

A cluster of near-duplicates goes to the side that the hash of its smallest content hash says; adding documents to a
corpus moves no others. Where that leaves a side (almost) without text, as with one large file, the documents are laid
end to end in the order of those hashes and cut at 90 and 95 % of the bytes, at line ends.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from torchstone.data.corpora import CorpusSpec, Document, document_digest, encoded
from torchstone.data.duplicates import Signatures
from torchstone.data.hashing import mix
from torchstone.errors import TorchstoneError

__all__ = ["SPLITS", "Split", "make"]

SPLITS = ("train", "valid", "test")
FORMAT = 1
"""Goes up whenever the same corpus would be split otherwise."""
_BOUNDS = (0.9, 0.95)


@dataclass(frozen=True)
class Split:
    """Which characters of each document belong to which side.

    Attributes:
        cuts: int64 (documents, 2): a text's characters before the first number are train, before the second valid,
            the rest test. Whole documents have numbers 0 or their length.
        documents, bytes: of the corpus, without empty documents.
        hash: identifies the corpus' content.
        train_hash: identifies the train side's content.
        train_bytes: of the train side.
        ranges: documents were cut.
    """

    cuts: np.ndarray
    documents: int
    bytes: int
    hash: str
    train_hash: str
    train_bytes: int
    ranges: bool

    @classmethod
    def load(cls, folder: Path) -> Split:
        """Reads what `make` wrote."""
        known = json.loads((folder / "split.json").read_text())
        return cls(np.memmap(folder / "cuts", "<i8", "r", shape=(known["documents"], 2)), **known)

    def pieces(self, corpus: CorpusSpec) -> Iterator[tuple[int, str, Document]]:
        """Number of the document, side, and the document's text on that side, in the order of the corpus.

        Raises:
            TorchstoneError: the corpus has gained or lost documents since.
        """
        number = -1
        for number, (document, _) in enumerate(encoded(corpus)):
            if number >= self.documents:
                break
            first, second = (int(cut) for cut in self.cuts[number])
            for side, text in zip(
                SPLITS, (document.text[:first], document.text[first:second], document.text[second:]), strict=True
            ):
                if text:
                    yield number, side, Document(document.name, text)
        if number + 1 != self.documents:
            raise TorchstoneError(f"corpus {corpus.title()} changed while it was read")


def make(corpus: CorpusSpec, folder: Path, grown: Callable[[int], None]) -> None:
    """Splits a corpus and writes the `Split` into `folder`; `grown` is told of the bytes written meanwhile.

    Raises:
        TorchstoneError: the corpus has no text.
    """
    size_D, length_D, digests = array("q"), array("q"), bytearray()
    with Signatures(folder / "signatures") as signatures:
        for document, raw in encoded(corpus):
            size_D.append(len(raw))
            length_D.append(len(document.text))
            digests += document_digest(raw)
            signatures.add(raw)
            grown(256)
        if not size_D:
            raise TorchstoneError(f"empty corpus: {corpus.title()} has no text")
        cluster_D = signatures.clusters()
    sizes, lengths = np.array(size_D), np.array(length_D)
    draws = _draws(np.frombuffer(digests, "<u8")[::2], cluster_D)
    total = int(sizes.sum())

    cuts = np.stack([np.where(draws < bound, lengths, 0) for bound in _BOUNDS], 1)
    train, valid, test = (
        sizes[side].sum() / total for side in (cuts[:, 0] > 0, (cuts[:, 0] == 0) & (cuts[:, 1] > 0), cuts[:, 1] == 0)
    )
    ranges = bool(train < 0.8 or valid < 0.01 or test < 0.01)
    if ranges:
        cuts, first = _ranges(corpus, sizes, lengths, draws)
    else:
        first = np.where(cuts[:, 0] > 0, sizes, 0)

    chosen = hashlib.blake2b(digest_size=16)
    for number in np.flatnonzero(cuts[:, 0]):
        chosen.update(digests[16 * number : 16 * number + 16] + int(cuts[number, 0]).to_bytes(8, "little"))
    (folder / "cuts").write_bytes(cuts.astype("<i8").tobytes())
    (folder / "split.json").write_text(
        json.dumps(
            {
                "documents": len(sizes),
                "bytes": total,
                "hash": hashlib.blake2b(digests, digest_size=16).hexdigest(),
                "train_hash": chosen.hexdigest(),
                "train_bytes": int(first.sum()),
                "ranges": ranges,
            }
        )
    )


def _draws(content_D: np.ndarray, cluster_D: np.ndarray) -> np.ndarray:
    """float64 (documents,) in [0, 1): decided by the smallest content hash of a document's cluster."""
    smallest = np.full(int(cluster_D.max()) + 1, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(smallest, cluster_D, content_D.astype(np.uint64))
    return ((mix(smallest) >> np.uint64(11)) / 2.0**53)[cluster_D]


def _ranges(
    corpus: CorpusSpec, sizes: np.ndarray, lengths: np.ndarray, draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts in characters, and the first cuts in bytes, that take contiguous ranges of the documents end to end."""
    order = np.argsort(draws, kind="stable")  # clusters stay together: a cut goes through one at most
    total = int(sizes.sum())
    start_D = np.empty_like(sizes)
    start_D[order] = np.cumsum(sizes[order]) - sizes[order]
    bytes_D2 = np.stack([np.clip(int(total * bound) - start_D, 0, sizes) for bound in _BOUNDS], 1)
    cuts = np.where(bytes_D2 > 0, lengths[:, None], 0)
    inside = set(np.flatnonzero(((bytes_D2 > 0) & (bytes_D2 < sizes[:, None])).any(axis=1)).tolist())
    for number, (_, raw) in enumerate(encoded(corpus)):
        if number in inside:
            for side in range(2):
                end = _line_end(raw, int(bytes_D2[number, side]), total // 40)
                bytes_D2[number, side], cuts[number, side] = end, len(raw[:end].decode())
    return cuts, bytes_D2[:, 0]


def _line_end(raw: bytes, at: int, slack: int) -> int:
    """The line end or end at or after a byte, if it is at most `slack` away, else the next character."""
    if at in (0, len(raw)):
        return at
    end = raw.find(b"\n", at - 1, at + slack) + 1
    if end:
        return end
    if len(raw) - at <= slack:
        return len(raw)
    while at < len(raw) and raw[at] & 0xC0 == 0x80:
        at += 1
    return at
