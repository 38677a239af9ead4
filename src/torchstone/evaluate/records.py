"""Records of JSON-lines files and of tables, and the fields that a task takes from them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torchstone.data.corpora._lines import table
from torchstone.errors import TorchstoneError, nearest

__all__ = ["Record", "read_records"]


@dataclass(frozen=True)
class Record:
    """One line of a file: its fields, and `where` it stands."""

    where: str
    fields: Mapping[str, Any]

    def get(self, *names: str) -> Any:
        """The first of these fields that is there.

        Raises:
            TorchstoneError: none is.
        """
        for name in names:
            if name in self.fields:
                return self.fields[name]
        wanted = " or ".join(repr(name) for name in names)
        raise TorchstoneError(
            f"{self.where}: no field {wanted}{nearest(names[0], self.fields)}; "
            f"fields: {', '.join(list(self.fields)[:10]) or 'none'}"
        )

    def text(self, *names: str) -> str:
        """The first of these fields that is there, a string.

        Raises:
            TorchstoneError: none is there, or it is something else.
        """
        value = self.get(*names)
        if not isinstance(value, str):
            name = next(name for name in names if name in self.fields)
            raise TorchstoneError(f"{self.where}: field {name!r} is {type(value).__name__}, a string is needed")
        return value


def read_records(path: str, limit: int | None = None) -> list[Record]:
    """The first `limit` records of a file of JSON objects, one a line, or of a ``.tsv`` file, whose header names the
    fields and whose values are strings. Blank lines are skipped.

    Raises:
        TorchstoneError: the file is missing, empty, not UTF-8, or a line is no JSON object or no row of the table.
    """
    tabs = path.endswith(".tsv")
    records = list(islice((Record(*row) for row in table(path)) if tabs else _records(path), limit))
    if not records:
        needed = "a row below a header" if tabs else "one JSON object a line"
        raise TorchstoneError(f"{path!r}: holds no record; {needed} is needed")
    return records


def _records(path: str) -> Iterator[Record]:
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    yield _record(raw, f"{path!r} line {number}")
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise TorchstoneError(f"cannot read {path!r}: {getattr(error, 'strerror', None) or error}") from None


def _record(raw: bytes, where: str) -> Record:
    try:
        fields = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise TorchstoneError(f"{where}: not UTF-8 (byte 0x{raw[error.start]:02x})") from None
    except json.JSONDecodeError as error:
        raise TorchstoneError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError):  # numbers and nesting beyond what Python reads
        raise TorchstoneError(f"{where}: not JSON that can be read here") from None
    if not isinstance(fields, dict):
        raise TorchstoneError(f"{where}: a JSON object is needed, not {type(fields).__name__}")
    return Record(where, fields)
