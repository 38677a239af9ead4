"""``torchstone vision k-means``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["main"]

_DATA = "digits, or a folder of images by class, or an .npz file of x and y."


def main(
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


def _images(data: str, **fields: Any) -> Any:
    """Prepared pictures of what the command line names."""
    from torchstone.data.images import ImagesDataSpec
    from torchstone.spec import validate

    source = {"source": data} if data == "digits" and not Path(data).exists() else {"path": data}
    return validate(ImagesDataSpec, {**source, **fields}).prepare()
