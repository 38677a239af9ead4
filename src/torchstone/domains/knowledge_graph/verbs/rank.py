"""``torchstone knowledge-graph rank``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["main"]


def main(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    relation: Annotated[str, typer.Option("--relation", help="Name of the relation.")],
    head: Annotated[str | None, typer.Option("--head", help="Name of the head: tails are ranked.")] = None,
    tail: Annotated[str | None, typer.Option("--tail", help="Name of the tail: heads are ranked.")] = None,
    top: Annotated[int, typer.Option("--top", help="How many entities.")] = 10,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "cpu",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")
    ] = False,
) -> None:
    """Rank entities as the missing end of a triple, the best first, with their scores."""
    from dataclasses import asdict

    from torchstone.domains.knowledge_graph import load

    answers = load(run, device).predict(relation=relation, head=head, tail=tail, top=top)
    if as_json:
        print(json.dumps([asdict(answer) for answer in answers], indent=2, ensure_ascii=False))
    else:
        for answer in answers:
            print(f"{answer.score:10.4f}  {answer.name}")
