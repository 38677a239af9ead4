"""`prepare`: a `TextDataSpec` becomes tokens on disk, once, and blocks to train on.

Three cached steps, each keyed by what it depends on: the split (corpus), the tokenizer (train split, settings), the
tokens (both). All stream: memory is bounded by the largest document and some hundred bytes for each document.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torchstone.data.corpora import CorpusSpec, Document, line
from torchstone.data.text import TextDataSpec
from torchstone.errors import TorchstoneError

if TYPE_CHECKING:
    from torchstone.data.blocks import Blocks
    from torchstone.data.split import Split
    from torchstone.data.store import Cache
    from torchstone.data.tokenizer import Tokenizer

__all__ = ["Encoding", "Prepared", "prepare", "prepare_several"]

_FORMAT = 1
"""Goes up whenever the same tokens would be written otherwise."""
_SAMPLE = 1 << 28
"""Bytes of the train split, at most, that a tokenizer is trained on; beyond it, documents are drawn evenly."""
_TOGETHER = 1 << 20
"""Characters that are encoded in one call."""
_EVERY = 2.0
"""Seconds between two lines of progress."""


@dataclass(frozen=True)
class Prepared:
    """A corpus, ready to train on.

    Attributes:
        tokenizer: turns text into the ids that the blocks hold.
        train, valid, test: blocks of each split.
        description: one line: files, bytes, hash, documents of each split.
        hash: identifies the corpus' content; numbers of different hashes do not compare.
    """

    tokenizer: Tokenizer
    train: Blocks
    valid: Blocks
    test: Blocks
    description: str
    hash: str
    _corpus: CorpusSpec
    _split: Split

    def texts(self, split: str) -> Iterator[Document]:
        """The documents of a split, ``train``, ``valid`` or ``test``, read anew from the corpus.

        Raises:
            TorchstoneError: the corpus has gained or lost documents since.
        """
        return (document for _, side, document in self._split.pieces(self._corpus) if side == split)


class Encoding:
    """What texts become in the streams of tokens: each a document of its ids. Kinds of data may have others."""

    settings: tuple[str, ...] = ()
    """What else than texts and tokenizer decides the ids; part of the key that they are cached by."""

    def tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer with what this needs besides."""
        return tokenizer

    def documents(self, tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> Iterator[list[list[int]]]:
        """For each (split, text) the documents that it becomes, without separators."""
        return ([ids] for ids in tokenizer.encode_batch([text for _, text in texts]))


def prepare(
    spec: TextDataSpec, progress: Callable[[str], None] | None = None, encoding: Encoding | None = None
) -> Prepared:
    """Splits and tokenises a corpus, or finds that in the cache.

    Several processes may do so at once. When it raises, nothing has changed on disk.

    Args:
        spec: what to prepare.
        progress: is given lines of text while work goes on.
        encoding: what texts become; by default their ids.

    Raises:
        TorchstoneError: the corpus cannot be read, is empty, or its train split is shorter than one block; the
            tokenizer cannot be read; the cache cannot be written.
    """
    (prepared,) = prepare_several(spec, [spec.corpus], progress, encoding)
    return prepared


def prepare_several(
    spec: TextDataSpec,
    corpora: Sequence[CorpusSpec],
    progress: Callable[[str], None] | None = None,
    encoding: Encoding | None = None,
) -> list[Prepared]:
    """As `prepare`, of several corpora in the place of the spec's, with one tokenizer: one that learns does so from the
    train splits of all."""
    say, encoding = progress or (lambda _: None), encoding or Encoding()
    from torchstone.data.hashing import digest
    from torchstone.data.split import FORMAT, SPLITS, Split, make
    from torchstone.data.store import Cache

    keys = [digest(FORMAT, corpus.fingerprint()) for corpus in corpora]
    found: list[tuple[CorpusSpec, Split, Path, dict]] = []
    with Cache(spec.cache_folder()) as cache:
        splits: list[Split] = []
        for corpus, key in zip(corpora, keys, strict=True):
            folder = cache.find("splits", key)
            if folder is None:
                say(f"reading {corpus.title()}")
                folder = cache.stage("splits", key)
                make(corpus, folder, lambda size: _grow(cache, size))
            splits.append(Split.load(folder))
        hashes = [split.train_hash for split in splits]
        texts = hashes[0] if len(hashes) == 1 else digest(*hashes)
        tokenizer = spec.tokenizer.load(lambda: _sample(corpora, splits, say), texts, cache)
        tokenizer = encoding.tokenizer(tokenizer)
        for corpus, key, split in zip(corpora, keys, splits, strict=True):
            tokens_key = digest(_FORMAT, key, tokenizer.hash, *encoding.settings)
            folder = cache.find("tokens", tokens_key)
            if folder is None:
                folder = cache.stage("tokens", tokens_key)
                _tokenise(corpus, split, tokenizer, encoding, folder, cache, say)
            meta = json.loads((folder / "tokens.json").read_text())
            tokens = meta["splits"]["train"]["tokens"]
            if tokens < spec.block:
                raise TorchstoneError(
                    f"data: the train split of {corpus.title()} is shorter than one block: {tokens:,} tokens, "
                    f"block {spec.block:,}"
                )
            found.append((corpus, split, cache.path("tokens", tokens_key), meta))
    return [_open(spec, corpus, split, tokenizer, folder, meta, SPLITS) for corpus, split, folder, meta in found]


def _grow(cache: Cache, size: int) -> None:
    cache.need += size


def _sample(corpora: Sequence[CorpusSpec], splits: Sequence[Split], say: Callable[[str], None]) -> Iterator[str]:
    """Texts of the train splits, thinned to `_SAMPLE` bytes by a hash of their number."""
    import numpy as np

    from torchstone.data.hashing import mix

    say("training the tokenizer")
    share = _SAMPLE / max(sum(split.train_bytes for split in splits), 1)
    limit = np.uint64(min(share, 1.0) * (2**64 - 2**12))
    for corpus, split in zip(corpora, splits, strict=True):
        for number, side, document in split.pieces(corpus):
            if side == "train" and (share >= 1 or mix(np.array([number], np.uint64))[0] < limit):
                yield document.text


def _tokenise(
    corpus: CorpusSpec,
    split: Split,
    tokenizer: Tokenizer,
    encoding: Encoding,
    folder: Path,
    cache: Cache,
    say: Callable[[str], None],
) -> None:
    """Writes ``<split>.tokens``, ``<split>.starts`` (int64, first token of each document) and ``tokens.json``."""
    import contextlib

    import numpy as np

    from torchstone.data.split import SPLITS

    dtype = np.dtype("<u2" if tokenizer.vocabulary <= 1 << 16 else "<u4")
    meta = {side: {"tokens": 0, "bytes": 0, "documents": 0} for side in SPLITS}
    before, last, read = cache.need, time.monotonic(), 0
    with contextlib.ExitStack() as stack:
        files = {
            (side, kind): stack.enter_context(open(folder / f"{side}.{kind}", "wb"))
            for side in SPLITS
            for kind in ("tokens", "starts")
        }

        def write(batch: list[tuple[str, str]]) -> None:
            for (side, text), documents in zip(batch, encoding.documents(tokenizer, batch), strict=True):
                counts = meta[side]
                counts["bytes"] += len(text.encode())
                for ids in documents:
                    files[side, "starts"].write(np.array([counts["tokens"]], "<i8").tobytes())
                    files[side, "tokens"].write(np.array([tokenizer.separator, *ids], dtype).tobytes())
                    counts["tokens"] += 1 + len(ids)
                    counts["documents"] += 1

        batch: list[tuple[str, str]] = []
        pending = 0
        cache.need = before + dtype.itemsize * split.bytes  # until some text shows how many bytes make a token
        for _, side, document in split.pieces(corpus):
            batch.append((side, document.text))
            pending += len(document.text)
            if pending < _TOGETHER:
                continue
            write(batch)
            batch, pending = [], 0
            read = sum(counts["bytes"] for counts in meta.values())
            size = sum(dtype.itemsize * counts["tokens"] + 8 * counts["documents"] for counts in meta.values())
            cache.need = before + size * split.bytes // read
            if time.monotonic() - last > _EVERY:
                last = time.monotonic()
                say(f"tokenising: {100 * read // split.bytes} % of {split.bytes / 1e6:,.0f} MB")
        write(batch)
    if sum(counts["bytes"] for counts in meta.values()) != split.bytes:
        raise TorchstoneError(f"corpus {corpus.title()} changed while it was read")
    (folder / "tokens.json").write_text(json.dumps({"dtype": dtype.str, "splits": meta}))


def _open(
    spec: TextDataSpec,
    corpus: CorpusSpec,
    split: Split,
    tokenizer: Tokenizer,
    folder: Path,
    meta: dict,
    sides: tuple[str, ...],
) -> Prepared:
    from torchstone.data.blocks import Blocks

    blocks = {
        side: Blocks(
            folder,
            side,
            meta["dtype"],
            block=spec.block,
            separate=spec.separate_documents,
            pad=tokenizer.pad,
            **meta["splits"][side],
        )
        for side in sides
    }
    counts = ", ".join(f"{side} {blocks[side].documents:,}" for side in sides)
    how = "cut at 90 and 95 % of the bytes at line ends" if split.ranges else "near-duplicates on one side"
    description = f"{line(corpus, split.documents, split.bytes, split.hash)}; {counts} ({how})"
    return Prepared(tokenizer, blocks["train"], blocks["valid"], blocks["test"], description, split.hash, corpus, split)
