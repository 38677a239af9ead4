"""Writing files so that a reader sees the old or the new content and nothing between."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchstone.errors import TorchstoneError

__all__ = ["digest", "full_disk", "read_json", "write_bytes", "write_json", "write_with"]


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Turn "no space left", "read-only" and "permission denied" into a sentence that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TorchstoneError(f"{folder}: no space left on the disk") from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise TorchstoneError(f"{folder}: cannot be written ({error.strerror})") from error
        raise


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then put it in its place; on an error nothing is left behind."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with full_disk(path.parent):
        try:
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if "No space left" in str(error):  # safetensors raises its own class
                raise OSError(errno.ENOSPC, "No space left on device") from error
            raise


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`."""
    write_with(path, lambda temporary: temporary.write_bytes(data))


def write_json(path: Path, data: Any) -> None:
    """Replace `path` by `data` as indented JSON."""
    write_bytes(path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The JSON in `path`.

    Raises:
        TorchstoneError: unreadable, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TorchstoneError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise TorchstoneError(f"{path}: no JSON ({error})") from None


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
