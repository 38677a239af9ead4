"""The verbs of the wing: ``torchstone vision ...``. Each imports what it needs when it runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Tokenizers of pictures, and what an encoder learned of them.")

_DATA = "digits, or a folder of images by class, or an .npz file of x and y."


def _images(data: str, **fields: Any) -> Any:
    """Prepared pictures of what the command line names."""
    from torchstone.data.images import ImagesDataSpec
    from torchstone.spec import validate

    source = {"source": data} if data == "digits" and not Path(data).exists() else {"path": data}
    return validate(ImagesDataSpec, {**source, **fields}).prepare()


@app.command("k-means")
def k_means(
    data: Annotated[str, typer.Argument(help=_DATA)],
    out: Annotated[Path, typer.Option("--out", help="The file to write, .safetensors.")],
    codes: Annotated[int, typer.Option(help="Number of codes.")] = 512,
    patch: Annotated[int, typer.Option(help="Pixels of a patch's side.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the draws, and of the split.")] = 0,
) -> None:
    """Make an image tokenizer: k-means of patches of the training split."""
    from torchstone.errors import TorchstoneError
    from torchstone.vision.tokenizers import fit_k_means

    if out.exists():
        raise TorchstoneError(f"{out}: exists; choose another --out")
    prepared = _images(data, seed=seed)
    made = fit_k_means((each["pixels"] for each in prepared.train.evaluation(256)), codes, patch, seed=seed)
    made.save(out)
    print(f"{out}: {made.codes} codes of {made.channels} x {patch} x {patch} pixels, from {prepared.description}")


@app.command()
def probe(
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
