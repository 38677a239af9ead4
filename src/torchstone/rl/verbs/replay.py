"""``torchstone rl replay``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["main"]

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")]


def main(
    dump: Annotated[Path, typer.Argument(help="What sample wrote.")],
    run: Annotated[Path, typer.Argument(help="A run directory: whose model and objective look at it.")],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    as_json: _Json = False,
) -> None:
    """The loss of dumped answers, and how far a model is from who wrote them."""
    from torchstone.rl.dumps import replay as work
    from torchstone.train.run import RunFolder

    _print(work(dump, RunFolder(run), device=device), as_json)


def _print(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    flat = {**found, **{f"reward {name}": value for name, value in found.get("rewards", {}).items()}}
    for name, value in flat.items():
        if not isinstance(value, dict):
            print(f"{name:<24} {value:.4f}" if isinstance(value, float) else f"{name:<24} {value}")
