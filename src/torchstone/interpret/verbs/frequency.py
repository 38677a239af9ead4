"""``torchstone interpret frequency``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["main"]


def main(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    popular: Annotated[
        int | None, typer.Option(min=1, help="Tokens that are popular; if left, the run's own, or a fifth.")
    ] = None,
    words: Annotated[int, typer.Option(min=0, help="Rare tokens to show with their neighbours.")] = 10,
    data: Annotated[
        str | None, typer.Option("--data", help="Count this corpus (a file, a folder, stdlib), not the training split.")
    ] = None,
    counts: Annotated[
        Path | None, typer.Option("--counts", help="Lines of a token or an id, a tab and its count, in its place.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")] = False,
) -> None:
    """Say how well a table of embeddings tells rare tokens from popular ones."""
    from torchstone.interpret.frequency import examine, text_of
    from torchstone.train.run import RunFolder

    report = examine(RunFolder(run), popular=popular, words=words, data=data, counts=counts)
    print(json.dumps(report) if as_json else text_of(report))
