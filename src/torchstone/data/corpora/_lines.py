"""JSON lines: objects, one a line, and their fields of text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from torchstone.data.corpora._files import decode, find
from torchstone.errors import TorchstoneError

__all__ = ["lines", "text_of"]


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
