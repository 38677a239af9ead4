"""The cache on disk: folders that appear whole or not at all, and are checked before they are believed.

An entry is ``<root>/<family>/<key>/``; its ``entry.json`` holds size and hash of every file. New entries are written in
a temporary folder of the same root and renamed into place when all of them are complete, so a crash, an error or a
second process at work leaves nothing half done. Processes do not wait for each other: the first to finish wins, the
others drop theirs, which hold the same.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO

from torchstone.errors import TorchstoneError

__all__ = ["Cache"]

_ENTRY = "entry.json"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def _checksum(path: Path) -> list[int | str]:
    hasher = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 18):
            hasher.update(block)
    return [path.stat().st_size, hasher.hexdigest()]


def _sound(folder: Path) -> bool:
    """Whether the entry holds exactly what was written."""
    try:
        files = json.loads((folder / _ENTRY).read_text())
        # Sizes first: a truncated file is found without reading the others.
        return all((folder / name).stat().st_size == size for name, (size, _) in files.items()) and all(
            _checksum(folder / name) == known for name, known in files.items()
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return False


class Cache:
    """A transaction on a cache folder: ``with Cache(root) as cache``.

    What was staged inside the block is published when it ends well; when it raises, the disk is as before. OSErrors
    raised inside are taken for trouble with the cache and become sentences.

    Attributes:
        need: bytes that the staged entries will have, as far as known; for the message when the disk is full.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.need = 0
        self._temporary: Path | None = None
        self._lock: IO[bytes] | None = None
        self._made: list[Path] = []
        self._staged: dict[tuple[str, str], Path] = {}

    def find(self, family: str, key: str) -> Path | None:
        """The folder of a sound entry, or None."""
        staged = self._staged.get((family, key))
        if staged is not None:
            return staged
        folder = self.root / family / key
        return folder if _sound(folder) else None

    def path(self, family: str, key: str) -> Path:
        """Where the entry is once the transaction has ended."""
        return self.root / family / key

    def stage(self, family: str, key: str) -> Path:
        """An empty folder to write a new entry into."""
        if self._temporary is None:
            self._begin()
        assert self._temporary is not None
        folder = self._temporary / f"{family}-{key}"
        folder.mkdir()
        self._staged[family, key] = folder
        return folder

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._publish()
        except OSError as trouble:
            error = trouble
        finally:
            self._end(failed=error is not None)
        if isinstance(error, OSError):
            raise self._sentence(error) from None

    def _sentence(self, error: OSError) -> TorchstoneError:
        if error.errno in _NO_SPACE:
            need = f"about {self.need:,} bytes are needed" if self.need else "more is needed"
            return TorchstoneError(f"no disk space for the token cache in {str(self.root)!r}: {need}")
        reason = error.strerror or str(error)
        return TorchstoneError(f"cannot use the token cache in {str(self.root)!r}: {reason}")

    def _begin(self) -> None:
        self._made = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
        self.root.mkdir(parents=True, exist_ok=True)
        self._sweep()
        name = f".tmp-{secrets.token_hex(8)}"
        # Locked before the folder exists: whoever gets the lock knows that the owner of the folder is gone.
        self._lock = open(self.root / f"{name}.lock", "wb")  # noqa: SIM115 - held until _end
        with contextlib.suppress(OSError):  # a file system without locks: then nothing is swept there either
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._temporary = self.root / name
        self._temporary.mkdir()

    def _sweep(self) -> None:
        """Removes what killed processes left behind: temporary folders whose lock nobody holds."""
        for lock in self.root.glob(".tmp-*.lock"):
            with contextlib.suppress(OSError), open(lock, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)

    def _publish(self) -> None:
        for folder in self._staged.values():
            files = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
            (folder / _ENTRY).write_text(json.dumps(files))
        for (family, key), folder in self._staged.items():
            target = self.path(family, key)
            target.parent.mkdir(exist_ok=True)
            if _sound(target):
                continue
            if target.exists():
                with contextlib.suppress(FileNotFoundError):  # another process moved it away first
                    os.rename(target, folder.with_name(f"{folder.name}-broken"))
            try:
                os.rename(folder, target)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # else another process published the same
                    raise

    def _end(self, failed: bool) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
        if self._lock is not None:
            Path(self._lock.name).unlink(missing_ok=True)
            self._lock.close()
        self._staged.clear()
        for folder in self._made if failed else []:
            with contextlib.suppress(OSError):
                folder.rmdir()
