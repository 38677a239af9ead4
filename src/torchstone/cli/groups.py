"""Groups of verbs that wings bring: the `app` of each ``cli.py``, named after its folder."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import typer

__all__ = ["groups"]


def groups() -> Iterator[tuple[str, typer.Typer]]:
    """Names and groups, in order. A wing's ``cli.py`` imports what it needs when a verb runs."""
    root = Path(__file__).parents[1]
    for file in sorted(root.glob("*/**/cli.py")):
        folder = file.parent.relative_to(root.parent).parts
        yield folder[-1].replace("_", "-"), importlib.import_module(".".join([*folder, "cli"])).app
