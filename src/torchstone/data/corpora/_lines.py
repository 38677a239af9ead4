"""JSON lines: objects, one a line, and their fields of text; and tables with tabs, whose rows are such objects."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from typing import Any

from torchstone.data.corpora._files import decode, find
from torchstone.errors import TorchstoneError

__all__ = ["lines", "table", "text_of"]


def lines(path: str | Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """For each line of the files that is not blank: what a document of it is called, where it stands, and its object.

    Args:
        path: a file, a folder (its ``.jsonl`` files) or a glob, or several of these.

    Raises:
        TorchstoneError: a file cannot be read or decoded, or a line is no object; says which.
    """
    for file in find(path, ".jsonl"):
        offset = 0
        try:
            with open(file.path, "rb") as raws:
                for number, raw in enumerate(raws, 1):
                    text = decode(raw, file.path, offset)
                    offset += len(raw)
                    if text.strip():
                        where = f"{str(file.path)!r} line {number}"
                        yield f"{file.name}:{number}", where, _object(text, where)
        except OSError as error:
            raise TorchstoneError(f"cannot read {str(file.path)!r}: {error.strerror or error}") from None


def table(path: str, columns: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, str]]]:
    """For each row of a ``.tsv`` file that is not blank: where it stands, and its fields by the names of the header, or
    by `columns` in a file without one. Quotes are characters as any other, a byte-order mark is none.

    Raises:
        TorchstoneError: the file cannot be read, or a row has more or fewer columns than there are names; says which.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            header = next(rows, []) if columns is None else columns
            for number, row in enumerate(rows, 2 if columns is None else 1):
                if row and len(row) != len(header):
                    who = "the header has" if columns is None else "data.columns names"
                    raise TorchstoneError(f"{path!r} line {number}: {len(row)} columns, {who} {len(header)}")
                if row:
                    yield f"{path!r} line {number}", dict(zip(header, row, strict=True))
    except (OSError, ValueError, csv.Error) as error:  # ValueError: not UTF-8, a zero byte in the path
        raise TorchstoneError(f"cannot read {path!r}: {getattr(error, 'strerror', None) or error}") from None


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise TorchstoneError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError):  # numbers and nesting beyond what Python reads
        raise TorchstoneError(f"{where}: not JSON that can be read here") from None
    if not isinstance(record, dict):
        raise TorchstoneError(f"{where}: a JSON object is needed, not {type(record).__name__}")
    return record


def text_of(record: dict[str, Any], field: str, where: str, utf8: bool = False) -> str:
    """A field of an object; with `utf8` one that UTF-8 can carry.

    Raises:
        TorchstoneError: there is none of that name, or it is no such string; says which.
    """
    if field not in record:
        raise TorchstoneError(f"{where}: no field {field!r}; fields: {', '.join(list(record)[:10]) or 'none'}")
    text = record[field]
    if not isinstance(text, str):
        raise TorchstoneError(f"{where}: field {field!r} is {type(text).__name__}, a string is needed")
    if utf8 and any("\ud800" <= character <= "\udfff" for character in text):
        raise TorchstoneError(f"{where}: field {field!r} holds half of a surrogate pair, which UTF-8 cannot carry")
    return text
