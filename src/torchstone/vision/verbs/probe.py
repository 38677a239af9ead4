"""``torchstone vision probe``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["main"]

_DATA = "digits, or a folder of images by class, or an .npz file of x and y."


def main(
    run: Annotated[Path, typer.Argument(help="A run directory of an encoder over patches.")],
    data: Annotated[str | None, typer.Argument(help=f"{_DATA} By default the run's own data.")] = None,
    layer: Annotated[
        int | None,
        typer.Option(help="Layer whose states are taken, from 0 or from the end; by default the last norm's."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")] = False,
) -> None:
    """Linear probe: fit logistic regression on a frozen encoder's features of labelled pictures."""
    from torchstone.errors import TorchstoneError
    from torchstone.train.environment import choose_device
    from torchstone.train.run import RunFolder
    from torchstone.vision.linear_probe import probe as measure

    folder = RunFolder(run).require()
    own = folder.recipe.data
    if data is None and own.example != "images":
        raise TorchstoneError(f"{run}: its data are {own.example}, not images; name labelled images to probe it with")
    model = folder.model(device=choose_device(device))
    prepared = own.prepare() if data is None else _images(data)
    found = measure(model, prepared, layer=layer, batch=batch)
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return
    where = "the last norm" if found.layer is None else f"layer {found.layer}"
    print(f"{prepared.description}")
    print(f"accuracy {found.accuracy:.4f} on {found.test:,} pictures, from {found.width} numbers after {where}")


def _images(data: str, **fields: Any) -> Any:
    """Prepared pictures of what the command line names."""
    from torchstone.data.images import ImagesDataSpec
    from torchstone.spec import validate

    source = {"source": data} if data == "digits" and not Path(data).exists() else {"path": data}
    return validate(ImagesDataSpec, {**source, **fields}).prepare()
