"""Files behind a corpus: finding, hashing and decoding them."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchstone.errors import TorchstoneError

__all__ = ["File", "decode", "find", "fingerprint", "pieces", "walk"]

PIECE = 1 << 24
"""Bytes of one document at most: a file beyond memory becomes several documents, cut at line ends."""


@dataclass(frozen=True)
class File:
    """A file and its name within the corpus (relative, with forward slashes)."""

    name: str
    path: Path


def walk(root: Path, suffix: str = "", skip: frozenset[str] = frozenset()) -> Iterator[File]:
    """Files under `root` that end in `suffix`, sorted, without hidden ones and folders named in `skip`."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        for name in names:
            path = Path(folder, name)
            # A dangling link is kept, so that reading it says what is wrong; sockets and pipes would block.
            if name.endswith(suffix) and not name.startswith(".") and (path.is_file() or not path.exists()):
                found.append(File(path.relative_to(root).as_posix(), path))
    yield from sorted(found, key=lambda file: file.name)


def find(paths: str | Sequence[str], suffix: str = "") -> list[File]:
    """The files that each path stands for: itself, all below it if it is a folder, or the matches of a glob.

    Args:
        paths: one path or several; ``~`` is expanded and ``**`` crosses folders.
        suffix: what files in folders must end in.

    Raises:
        TorchstoneError: a path is nothing of the three, or stands for no file.
    """
    found: dict[Path, File] = {}
    for text in [paths] if isinstance(paths, str) else paths:
        plain = os.path.expanduser(text)
        path = Path(plain)
        # os.path answers False where Path raises: names that are too long or hold a zero byte.
        if os.path.isdir(plain):
            files, reason = list(walk(path, suffix)), f"no {suffix + ' ' if suffix else ''}file in folder {text!r}"
        elif os.path.isfile(plain):
            files, reason = [File(path.name, path)], ""
        elif os.path.exists(plain):
            raise TorchstoneError(f"{text!r} is neither a file nor a folder")
        elif glob.has_magic(text):
            root = Path(*itertools.takewhile(lambda step: not glob.has_magic(step), path.parts))
            matches = sorted(Path(match) for match in glob.glob(plain, recursive=True) if os.path.isfile(match))
            files, reason = (
                [File(match.relative_to(root).as_posix(), match) for match in matches],
                f"no file matches {text!r}",
            )
        else:
            raise TorchstoneError(f"no such file or folder: {text!r}")
        if not files:
            raise TorchstoneError(f"empty corpus: {reason}")
        for file in files:
            found.setdefault(file.path, file)
    return list(found.values())


def blocks(path: Path, size: int = PIECE) -> Iterator[bytes]:
    """The bytes of a file, `size` at a time.

    Raises:
        TorchstoneError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            while block := file.read(size):
                yield block
    except OSError as error:
        raise TorchstoneError(f"cannot read {str(path)!r}: {error.strerror or error}") from None


def fingerprint(files: Sequence[File], *settings: str) -> str:
    """A hash of names, sizes and contents of `files`, in order, and of `settings`. Streams; holds one piece."""
    total = hashlib.blake2b(digest_size=16)
    for text in settings:
        total.update(f"{len(text)}:{text};".encode())
    for file in files:
        size, inner = 0, hashlib.blake2b(digest_size=16)
        for block in blocks(file.path):
            size += len(block)
            inner.update(block)
        total.update(f"{len(file.name)}:{file.name}:{size}:{inner.hexdigest()};".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def decode(raw: bytes, path: Path, offset: int) -> str:
    """`raw`, which stands at `offset` of the file, as text.

    Raises:
        TorchstoneError: it is not UTF-8; names file, offset and byte.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise TorchstoneError(
            f"{str(path)!r} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start} "
            f"({error.reason})"
        ) from None


def _cut(raw: bytes) -> int:
    """Where to cut a piece: after its last line end, else before a character that may be incomplete."""
    end = raw.rfind(b"\n") + 1
    if end:
        return end
    for back in range(1, 5):
        if raw[-back] & 0xC0 == 0xC0:
            return len(raw) - back or len(raw)
    return len(raw)


def pieces(path: Path, size: int = PIECE) -> Iterator[str]:
    """The text of a file, in as few pieces of about `size` bytes as hold it; pieces end at line ends if there are any.

    Raises:
        TorchstoneError: the file cannot be read or is not UTF-8.
    """
    rest, offset = b"", 0
    for block in blocks(path, size):
        rest += block
        if len(block) == size:
            end = _cut(rest)
            yield decode(rest[:end], path, offset)
            rest, offset = rest[end:], offset + end
    if rest:
        yield decode(rest, path, offset)
