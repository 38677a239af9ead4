"""Text files: one, a folder of them, or a glob."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from torchstone.data.corpora import CorpusSpec, Document
from torchstone.data.corpora._files import find, fingerprint, pieces

__all__ = ["TextSpec"]


class TextSpec(CorpusSpec):
    """UTF-8 text files: a file, a folder with all that is in it, or a glob.

    Hidden files and folders inside a folder are left out. A file above 16 MiB counts as several documents, cut at line
    ends, so that no file need fit into memory.
    """

    unit = "files"

    path: str | tuple[str, ...] = Field(min_length=1)
    """A file, a folder or a glob, or a list of these."""

    def documents(self) -> Iterator[Document]:
        for file in find(self.path):
            for number, text in enumerate(pieces(file.path), 1):
                yield Document(file.name if number == 1 else f"{file.name}#{number}", text)

    def fingerprint(self) -> str:
        return fingerprint(find(self.path), self.kind)

    def title(self) -> str:
        return self.path if isinstance(self.path, str) else ", ".join(self.path)
