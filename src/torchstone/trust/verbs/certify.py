"""``torchstone trust certify``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["main"]


def main(
    run: Annotated[Path, typer.Argument(help="A run directory of a classifier of images.")],
    sigma: Annotated[
        float | None, typer.Option(help="Standard deviation of the noise; by default as in training.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A folder or .npz file of images; by default the run's test split.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="A folder for certified.json.")] = None,
    n0: Annotated[int, typer.Option("--n0", help="Samples that choose the class.")] = 100,
    n: Annotated[int, typer.Option("--n", help="Samples that bound its probability.")] = 100_000,
    alpha: Annotated[float, typer.Option(help="Probability with which a certificate may be wrong.")] = 0.001,
    beta: Annotated[
        float | None, typer.Option(help="Certify the softmax at this inverse temperature instead of votes.")
    ] = None,
    radius: Annotated[
        list[float] | None,
        typer.Option("--radius", help="Where to report certified accuracy (0, 0.25, 0.5, 0.75, 1)."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only this many examples.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")] = False,
) -> None:
    """Certify a run's classifier under Gaussian noise: in which L2 radius no change of pixels changes its class."""
    from torchstone.train.run import RunFolder
    from torchstone.trust.certification import RADII, certify

    report = certify(
        RunFolder(run),
        out,
        data=data,
        sigma=sigma,
        n0=n0,
        n=n,
        alpha=alpha,
        beta=beta,
        radii=radius or RADII,
        limit=limit,
        device=device,
        seed=seed,
    )
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    print(f"average certified radius {report['average_certified_radius']:.4f} of {report['examples']} examples")
    for r, share in zip(report["radii"], report["certified_accuracy"], strict=True):
        print(f"    radius {r:<6g} certified accuracy {share:.4f}")
    print(f"abstained {report['abstained']:.4f}; {report['n']} samples certify {report['largest_radius']:.4f} at most")
