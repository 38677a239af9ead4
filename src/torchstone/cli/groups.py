"""Groups of verbs that wings bring: each file of a folder ``verbs`` is one, and the folder's docstring is their help.

``interpret/verbs/frequency.py`` is ``torchstone interpret frequency``: its function `main` is a command of
typer, and imports what it needs when it runs, so that help answers at once.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import typer

__all__ = ["groups"]


def groups() -> Iterator[tuple[str, typer.Typer]]:
    """Names and groups, in order."""
    root = Path(__file__).parents[1]
    for folder in sorted(root.glob("*/**/verbs")):
        package = ".".join(folder.relative_to(root.parent).parts)
        group = typer.Typer(no_args_is_help=True, help=importlib.import_module(package).__doc__)
        group.callback()(lambda: None)  # a group also while it has one verb
        for file in sorted(folder.glob("[!_]*.py")):
            verb = importlib.import_module(f"{package}.{file.stem}").main
            group.command(file.stem.replace("_", "-"))(verb)
        yield folder.parent.name.replace("_", "-"), group
