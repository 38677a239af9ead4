"""Sources of pinned pure-Python distributions: the same bytes on every machine.

``python -m torchstone.data.corpora.packages`` prints the manifest entries of what is installed; a new release is added
by copying its entry into ``packages.json``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchstone.data.corpora import CorpusSpec, Document
from torchstone.data.corpora._files import File, blocks, decode, fingerprint
from torchstone.errors import TorchstoneError

__all__ = ["PackagesSpec", "measure"]

DISTRIBUTIONS = ("networkx", "sympy")
"""Pure Python, and required by torch."""
_SKIP = frozenset({"tests", "benchmarks", "test-examples", "_antlr"})  # tests, their data and generated parsers


@functools.cache
def manifest() -> dict[str, dict[str, dict[str, Any]]]:
    """Distribution -> version -> number of files, bytes and SHA-256, as committed."""
    return json.loads((Path(__file__).parent / "packages.json").read_text())


def sources(name: str) -> tuple[str, list[File]]:
    """The installed version of a distribution and its Python sources without tests, sorted by name.

    Raises:
        TorchstoneError: it is not installed.
    """
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        known = ", ".join(manifest().get(name, {}))
        raise TorchstoneError(f"corpus packages: {name} is not installed; versions known: {known}") from None
    files = [
        File(file.as_posix(), Path(str(file.locate())))
        for file in distribution.files or []
        if file.suffix == ".py" and file.parts[0] == name and not _SKIP.intersection(file.parts)
    ]
    return distribution.version, sorted(files, key=lambda file: file.name)


def measure(files: list[File]) -> dict[str, Any]:
    """The manifest entry of these files: one SHA-256 over their sorted names and SHA-256s."""
    size, total = 0, hashlib.sha256()
    for file in files:
        raw = b"".join(blocks(file.path))
        size += len(raw)
        total.update(f"{file.name} {hashlib.sha256(raw).hexdigest()}\n".encode())
    return {"files": len(files), "bytes": size, "sha256": total.hexdigest()}


class PackagesSpec(CorpusSpec):
    """The Python sources of sympy and networkx in a version that the manifest knows, without their tests."""

    unit = "files"

    def _files(self) -> list[File]:
        """All files, checked against the manifest: whoever reads them knows the bytes."""
        found = []
        for name in DISTRIBUTIONS:
            version, files = sources(name)
            versions = manifest()[name]
            known = ", ".join(versions)
            if version not in versions:
                raise TorchstoneError(f"corpus packages: {name} {version} is installed; versions known: {known}")
            if measure(files) != versions[version]:
                raise TorchstoneError(
                    f"corpus packages: the files of {name} {version} are not those that were published "
                    f"(reinstall it); versions known: {known}"
                )
            found += files
        return found

    def documents(self) -> Iterator[Document]:
        for file in self._files():
            yield Document(file.name, decode(b"".join(blocks(file.path)), file.path, 0))

    def fingerprint(self) -> str:
        return fingerprint(self._files(), self.kind)

    def title(self) -> str:
        return " and ".join(f"{name} {importlib.metadata.version(name)}" for name in DISTRIBUTIONS)


if __name__ == "__main__":
    entries = {}
    for _name in DISTRIBUTIONS:
        _version, _files = sources(_name)
        entries[_name] = {_version: measure(_files)}
    print(json.dumps(entries, indent=2))
