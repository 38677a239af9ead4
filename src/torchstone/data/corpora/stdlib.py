"""The running Python's own library: real text that every machine has. It differs between versions of Python."""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from torchstone.data.corpora import CorpusSpec, Document
from torchstone.data.corpora._files import File, blocks, fingerprint, walk

__all__ = ["StdlibSpec"]

_SKIP = frozenset(
    ["test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "site-packages", "dist-packages"]
)


class StdlibSpec(CorpusSpec):
    """The Python sources of the running Python's standard library.

    Without tests, IDLE, tkinter, lib2to3, ensurepip, the generated tables of `encodings`, installed packages, and files
    that are not UTF-8.
    """

    unit = "files"

    def _files(self) -> list[File]:
        return list(walk(Path(sysconfig.get_path("stdlib")), ".py", _SKIP))

    def documents(self) -> Iterator[Document]:
        for file in self._files():
            raw = b"".join(blocks(file.path))
            if file.name.startswith("encodings/") and b"decoding_table" in raw:
                continue
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                continue
            yield Document(file.name, text)

    def fingerprint(self) -> str:
        return fingerprint(self._files(), self.kind)

    def title(self) -> str:
        return f"stdlib of Python {platform.python_version()}"
