"""``torchstone trust evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["main"]


def main(
    run: Annotated[Path, typer.Argument(help="A run directory of a classifier of images.")],
    attack: Annotated[
        str, typer.Option(help="Some of pgd, adaptive-pgd, multi-target, gama, cw, with commas.")
    ] = "pgd",
    data: Annotated[
        Path | None, typer.Option(help="A folder or .npz file of images; by default the run's test split.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="A folder for trust.json.")] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="By how much a pixel may change; by default as in training.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of PGD.")] = 50,
    restarts: Annotated[int, typer.Option(help="Restarts of PGD.")] = 1,
    eta: Annotated[
        list[float] | None,
        typer.Option("--eta", help="Weight of log R-Con in adaptive-pgd (0.1, 0.3, 1); of several the worst counts."),
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of right predictions that a threshold keeps.")] = 0.95,
    xi: Annotated[float, typer.Option(help="xi of the coupled rule.")] = 0.0,
    limit: Annotated[int | None, typer.Option(help="Only this many examples.")] = None,
    batch: Annotated[int, typer.Option(help="Examples at once.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the noise that attacks start from.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")] = False,
) -> None:
    """Attack a run's classifier: accuracy, and how well each score tells right from wrong predictions."""
    from torchstone.train.run import RunFolder
    from torchstone.trust.attacks import ETAS
    from torchstone.trust.evaluation import evaluate as measure

    report = measure(
        RunFolder(run),
        [name.strip() for name in attack.split(",") if name.strip()],
        out,
        data=data,
        epsilon=epsilon,
        steps=steps,
        restarts=restarts,
        etas=ETAS if eta is None else eta,
        keep=keep,
        xi=xi,
        limit=limit,
        batch=batch,
        device=device,
        seed=seed,
    )
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    for name, row in report["attacks"].items():
        print(f"{name:<14} accuracy {row['accuracy']:.4f}{_nearest(row)}")
        for score, found in row["scores"].items():
            print(f"    {score:<10} " + "  ".join(f"{what} {_shown(value)}" for what, value in found.items()))
        for rule, found in row["rules"].items():
            print(f"    rule {rule:<10} accepts {found['accepted']:.4f}, accuracy {_shown(found['accuracy'])}")


def _nearest(row: dict[str, Any]) -> str:
    if "evaded" not in row:
        return ""
    return f"; evaded {row['evaded']:.4f}, median distance {_shown(row['distance'])}"


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
