"""JSON lines: one document a line, in one field."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from torchstone.data.corpora import CorpusSpec, Document
from torchstone.data.corpora._files import find, fingerprint
from torchstone.data.corpora._lines import lines, text_of

__all__ = ["JsonlSpec"]


class JsonlSpec(CorpusSpec):
    """JSON-lines files: each line an object, one field of which is a document. Blank lines are skipped."""

    unit = "records"

    path: str | tuple[str, ...] = Field(min_length=1)
    """A file, a folder (its ``.jsonl`` files) or a glob, or a list of these."""
    field: str = "text"
    """The field that holds the text."""

    def documents(self) -> Iterator[Document]:
        for name, where, record in lines(self.path):
            yield Document(name, text_of(record, self.field, where))

    def fingerprint(self) -> str:
        return fingerprint(find(self.path, ".jsonl"), self.kind, self.field)

    def title(self) -> str:
        return self.path if isinstance(self.path, str) else ", ".join(self.path)
