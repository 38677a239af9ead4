"""``torchstone interpret knowledge-neurons``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

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
    fill: Annotated[str, typer.Option(help="With --erase: zero, or unk, the row of what is unknown.")] = "zero",
    by: Annotated[str, typer.Option(help="attribution, or activation, the baseline.")] = "attribution",
    rule: Annotated[str, typer.Option(help="Where steps are looked at: left, right or midpoint.")] = "midpoint",
    steps: Annotated[int, typer.Option(help="Steps of the integral.")] = 20,
    threshold: Annotated[float, typer.Option(help="Share of a prompt's largest attribution.")] = 0.2,
    share: Annotated[float, typer.Option(help="Share of a fact's prompts, to begin with.")] = 0.7,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")] = False,
) -> None:
    """Find the hidden units that facts hang on, and what happens without them."""
    from torchstone.interpret.facts import examine, text_of
    from torchstone.train.run import RunFolder

    options: dict[str, Any] = {"fill": fill, "by": by, "rule": rule}  # are looked at where they are used
    report = examine(
        RunFolder(run),
        facts,
        relations=relation,
        limit=limit,
        erase=erase,
        out=out,
        **options,
        steps=steps,
        threshold=threshold,
        share=share,
    )
    print(json.dumps(report) if as_json else text_of(report))
