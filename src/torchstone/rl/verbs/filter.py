"""``torchstone rl filter``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["main"]

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")]


def main(
    dump: Annotated[Path, typer.Argument(help="What sample wrote.")],
    out: Annotated[Path, typer.Option("--out", help="JSON lines, as data responses reads them.")],
    at_least: Annotated[float, typer.Option(help="The least reward that is kept.")] = 1.0,
    per_prompt: Annotated[int | None, typer.Option(help="Different answers of a prompt, at most.")] = None,
    drop: Annotated[str | None, typer.Option(help="Regular expression that no answer may hold.")] = None,
    as_json: _Json = False,
) -> None:
    """Keep answers that score well, as prompts and responses to tune on."""
    from torchstone.rl.dumps import filter_dump

    _print(filter_dump(dump, out, at_least=at_least, per_prompt=per_prompt, drop=drop), as_json)


def _print(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    flat = {**found, **{f"reward {name}": value for name, value in found.get("rewards", {}).items()}}
    for name, value in flat.items():
        if not isinstance(value, dict):
            print(f"{name:<24} {value:.4f}" if isinstance(value, float) else f"{name:<24} {value}")
