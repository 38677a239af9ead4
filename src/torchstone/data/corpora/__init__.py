"""Corpora: where text comes from. One file a kind; a corpus streams documents and never holds them all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torchstone.errors import TorchstoneError
from torchstone.spec import PartSpec, lazy_parts

__all__ = ["CorpusSpec", "Document"]


@dataclass(frozen=True)
class Document:
    """One text and a name to find it again: a path, a path and a line, a row."""

    name: str
    text: str


class CorpusSpec(PartSpec):
    """A source of documents. A kind implements `documents`, and `fingerprint` where it can be had for less."""

    family: ClassVar[str] = "corpus"
    default_kind: ClassVar[str] = "stdlib"
    unit: ClassVar[str] = "documents"
    """What one document is called in descriptions."""

    def documents(self) -> Iterator[Document]:
        """Every document, always in the same order; may be called again to start over.

        Raises:
            TorchstoneError: something cannot be read.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hex digits that change whenever the content does."""
        return content(self)[2]

    def title(self) -> str:
        """What this corpus is, for the first words of a description."""
        return self.kind

    def describe(self) -> str:
        """One line: title, number of documents, bytes and content hash. Reads the corpus once."""
        count, size, name = content(self)
        return line(self, count, size, name)


def line(corpus: CorpusSpec, count: int, size: int, content_hash: str) -> str:
    """The description of a corpus whose counts are known."""
    return f"{corpus.title()}: {count:,} {corpus.unit}, {size:,} bytes, hash {content_hash[:16]}"


def encoded(corpus: CorpusSpec) -> Iterator[tuple[Document, bytes]]:
    """The documents that hold any text, each with its UTF-8 bytes.

    Raises:
        TorchstoneError: a text holds half of a surrogate pair, which UTF-8 cannot carry.
    """
    for document in corpus.documents():
        if not document.text:
            continue
        try:
            yield document, document.text.encode()
        except UnicodeEncodeError as error:
            raise TorchstoneError(
                f"{document.name}: the text holds half of a surrogate pair at character {error.start}, "
                "which UTF-8 cannot carry"
            ) from None


def document_digest(raw: bytes) -> bytes:
    """16 bytes that identify a document's text."""
    return hashlib.blake2b(raw, digest_size=16).digest()


def content(corpus: CorpusSpec) -> tuple[int, int, str]:
    """Number of documents with text, their bytes, and the hash of their contents in order."""
    count, size, hasher = 0, 0, hashlib.blake2b(digest_size=16)
    for _, raw in encoded(corpus):
        count += 1
        size += len(raw)
        hasher.update(document_digest(raw))
    return count, size, hasher.hexdigest()


__getattr__ = lazy_parts(__name__)
