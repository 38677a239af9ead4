"""Format versions of runs and how an old one becomes today's.

A change of what `recipe.yaml` or `config.json` say raises FORMAT_VERSION and adds one function from the version before.
A run of every released version is kept among the tests and must load, resume and agree.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torchstone.errors import TorchstoneError

__all__ = ["FORMAT_VERSION", "MIGRATIONS", "migrate"]

FORMAT_VERSION = 1

MIGRATIONS: dict[tuple[Literal["recipe", "config"], int], Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""(document, version) -> the same document in version + 1."""


def migrate(document: Literal["recipe", "config"], data: Any, version: int, path: Path) -> Any:
    """`data` of format `version` in today's format.

    Raises:
        TorchstoneError: the format is newer than this installation, or no longer known.
    """
    if version > FORMAT_VERSION:
        raise TorchstoneError(
            f"{path}: written in format {version}, this torchstone reads up to {FORMAT_VERSION}; upgrade it"
        )
    if version < 1:
        raise TorchstoneError(f"{path}: format {version} is unknown; formats are 1 to {FORMAT_VERSION}")
    for at in range(version, FORMAT_VERSION):
        if (document, at) in MIGRATIONS:
            data = MIGRATIONS[document, at](dict(data))
    return data
