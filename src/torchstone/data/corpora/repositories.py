"""Repositories of source code, a document each, as DeepSeek-Coder was trained on them (Guo et al. 2024, arXiv
2401.14196, section 2): rules keep or drop files, imports order them, near-duplicates go as whole repositories."""

from __future__ import annotations

import glob
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from torchstone.data.corpora import CorpusSpec, Document
from torchstone.data.corpora._dependencies import dependencies, ordered
from torchstone.data.corpora._files import File, blocks, decode, fingerprint, walk
from torchstone.data.corpora._rules import keeps
from torchstone.errors import TorchstoneError

__all__ = ["RepositoriesSpec"]

_FORMAT = "1"
"""Goes up whenever the same files would make other documents."""
_SKIP = frozenset({"__pycache__", "node_modules", "site-packages"})
_COMMENTS = {
    f".{suffix}": begin
    for begin, suffixes in (
        ("#", "py pyi rb sh bash pl pm r jl ex exs yaml yml toml cmake tcl nim ps1"),
        ("//", "c h cc cpp cxx hh hpp hxx cu cuh cs java js jsx mjs ts tsx go rs swift kt kts scala php dart m mm"),
        ("//", "groovy zig v sv proto fs fsx sol glsl d json vue"),
        ("--", "lua sql hs elm ada adb ads vhd vhdl"),
        (";", "lisp el clj cljs scm rkt asm s"),
        ("%", "tex erl hrl prolog"),
        ("!", "f90 f95 f03"),
        ("<!--", "html htm xml xsl xslt md"),
        ("/*", "css scss less"),
        ("(*", "ml mli"),
    )
    for suffix in suffixes.split()
}
"""Suffix of a file of code -> what begins a comment in it."""
_ENDS = {"<!--": "-->", "/*": "*/", "(*": "*)"}


class RepositoriesSpec(CorpusSpec):
    """Folders of source code: the files of a repository in order of dependency, as one document.

    Each file comes after the files of the repository that it imports (Python, Java, C#, C and C++; the others follow by
    path), behind a comment with its path. Files are known by their suffixes; hidden ones, and what was installed, are
    left out. A repository that nearly repeats one before it is left out whole: to drop single files would tear holes.
    """

    paper: ClassVar[str] = "Guo et al. 2024, arXiv 2401.14196"
    unit = "repositories"

    path: str | tuple[str, ...] = Field(min_length=1)
    """The folder of a repository, a glob of such folders (``~/src/*``), or a list of these."""
    rules: bool = True
    """Drop files with lines of more than 1000 characters or 100 on average, with less than a quarter of letters, with
    XML at their beginning, of HTML with little text, of JSON or YAML outside 50 to 5000 characters."""
    near_duplicates: bool = False
    """Keep repositories that nearly repeat an earlier one."""

    def _folders(self) -> list[File]:
        """The repositories and their names.

        Raises:
            TorchstoneError: a path is no folder, or a glob matches none.
        """
        found: dict[Path, File] = {}
        for text in [self.path] if isinstance(self.path, str) else self.path:
            plain = os.path.expanduser(text)
            if os.path.isdir(plain):
                matches, root = [Path(plain)], Path(plain).absolute().parent
            elif os.path.exists(plain):
                raise TorchstoneError(f"{text!r} is a file, and a repository is a folder")
            elif glob.has_magic(text):
                matches = sorted(Path(match) for match in glob.glob(plain, recursive=True) if os.path.isdir(match))
                root = Path(*itertools.takewhile(lambda step: not glob.has_magic(step), Path(plain).parts)).absolute()
                if not matches:
                    raise TorchstoneError(f"empty corpus: no folder matches {text!r}")
            else:
                raise TorchstoneError(f"no such folder: {text!r}")
            for match in matches:
                path = match.absolute()
                found.setdefault(path, File(path.relative_to(root).as_posix(), path))
        return list(found.values())

    @staticmethod
    def _files(folder: File) -> list[File]:
        return [file for file in walk(folder.path, skip=_SKIP) if file.path.suffix.lower() in _COMMENTS]

    def _joined(self, folder: File) -> Document:
        """A repository as one text; empty if no file is kept."""
        texts = {file.name: decode(b"".join(blocks(file.path)), file.path, 0) for file in self._files(folder)}
        needs = dependencies(texts, folder.path.name)
        kept = {
            name for name, text in texts.items() if (keeps(Path(name).suffix.lower(), text) if self.rules else text)
        }
        order = ordered({name: needs[name] & kept for name in sorted(kept)})
        return Document(folder.name, "\n".join(f"{_comment(name)}\n{texts[name]}" for name in order))

    def documents(self) -> Iterator[Document]:
        folders = self._folders()
        kept = set(range(len(folders))) if self.near_duplicates or len(folders) < 2 else self._different(folders)
        for number, folder in enumerate(folders):
            if number in kept:
                yield self._joined(folder)

    def _different(self, folders: list[File]) -> set[int]:
        """Numbers of the first repository of each cluster of near-duplicates."""
        import numpy as np

        from torchstone.data.duplicates import Signatures

        with tempfile.TemporaryDirectory() as made, Signatures(Path(made, "signatures")) as signatures:
            for folder in folders:
                signatures.add(self._joined(folder).text.encode())
            return set(np.unique(signatures.clusters(), return_index=True)[1].tolist())

    def fingerprint(self) -> str:
        files = [
            File(f"{folder.name}/{file.name}", file.path) for folder in self._folders() for file in self._files(folder)
        ]
        return fingerprint(files, self.kind, _FORMAT, str(self.rules), str(self.near_duplicates))

    def title(self) -> str:
        return self.path if isinstance(self.path, str) else ", ".join(self.path)


def _comment(name: str) -> str:
    """The comment that says which file follows, in its language."""
    begin = _COMMENTS[Path(name).suffix.lower()]
    return f"{begin} {name} {_ENDS[begin]}" if begin in _ENDS else f"{begin}{name}"
