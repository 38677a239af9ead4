"""``torchstone rl doctor``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["main"]


def main(
    run: Annotated[Path, typer.Argument(help="The directory of a run of policy gradients.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")] = False,
) -> None:
    """What a training's metrics show, and what to try."""
    from torchstone.rl.doctor import examine
    from torchstone.train.run import RunFolder

    found = examine(RunFolder(run))
    print(json.dumps(found.dump()) if as_json else found)
