"""JSON lines: one document a line, in one field."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pydantic import Field

from torchstone.data.corpora import CorpusSpec, Document
from torchstone.data.corpora._files import decode, find, fingerprint
from torchstone.errors import TorchstoneError

__all__ = ["JsonlSpec"]


class JsonlSpec(CorpusSpec):
    """JSON-lines files: each line an object, one field of which is a document. Blank lines are skipped."""

    unit = "records"

    path: str | tuple[str, ...] = Field(min_length=1)
    """A file, a folder (its ``.jsonl`` files) or a glob, or a list of these."""
    field: str = "text"
    """The field that holds the text."""

    def documents(self) -> Iterator[Document]:
        for file in find(self.path, ".jsonl"):
            offset = 0
            try:
                with open(file.path, "rb") as lines:
                    for number, raw in enumerate(lines, 1):
                        text = decode(raw, file.path, offset)
                        offset += len(raw)
                        if text.strip():
                            yield Document(
                                f"{file.name}:{number}", self._text(text, f"{str(file.path)!r} line {number}")
                            )
            except OSError as error:
                raise TorchstoneError(f"cannot read {str(file.path)!r}: {error.strerror or error}") from None

    def _text(self, line: str, where: str) -> str:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise TorchstoneError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
        except (ValueError, RecursionError):  # numbers and nesting beyond what Python reads
            raise TorchstoneError(f"{where}: not JSON that can be read here") from None
        if not isinstance(record, dict):
            raise TorchstoneError(f"{where}: a JSON object is needed, not {type(record).__name__}")
        if self.field not in record:
            fields = ", ".join(list(record)[:10]) or "none"
            raise TorchstoneError(f"{where}: no field {self.field!r}; fields: {fields}")
        if not isinstance(record[self.field], str):
            got = type(record[self.field]).__name__
            raise TorchstoneError(f"{where}: field {self.field!r} is {got}, a string is needed")
        return record[self.field]

    def fingerprint(self) -> str:
        return fingerprint(find(self.path, ".jsonl"), self.kind, self.field)

    def title(self) -> str:
        return self.path if isinstance(self.path, str) else ", ".join(self.path)
