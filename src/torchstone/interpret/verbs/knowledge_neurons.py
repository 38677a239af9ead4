"""``torchstone interpret knowledge-neurons``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["main"]


def main(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    facts: Annotated[
        Path, typer.Option("--facts", help="JSON: {relation: {fact: [[prompt, answer, relation], ...]}}, as ParaRel.")
    ],
    relation: Annotated[list[str] | None, typer.Option("--relation", help="Only this one; may be given again.")] = None,
    limit: Annotated[int | None, typer.Option(help="Facts of a relation, at most.")] = None,
    erase: Annotated[
        str | None, typer.Option("--erase", help="Empty the neurons of most facts of this relation.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="With --erase: a copy of the run with the edit.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of the integral.")] = 20,
    threshold: Annotated[float, typer.Option(help="Share of a prompt's largest attribution.")] = 0.2,
    share: Annotated[float, typer.Option(help="Share of a fact's prompts, to begin with.")] = 0.7,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")] = False,
) -> None:
    """Find the hidden units that facts hang on, and what happens without them."""
    from torchstone.interpret.facts import examine, text_of
    from torchstone.train.run import RunFolder

    report = examine(
        RunFolder(run),
        facts,
        relations=relation,
        limit=limit,
        erase=erase,
        out=out,
        steps=steps,
        threshold=threshold,
        share=share,
    )
    print(json.dumps(report) if as_json else text_of(report))
