"""``torchstone adapt classify``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["main"]


def main(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    file: Annotated[str, typer.Argument(help="JSON lines, or .tsv with a header: text, and label where it is known.")],
    template: Annotated[str, typer.Option(help="How an input is written, with {x} and {y}.")],
    label: Annotated[list[str], typer.Option("--label", help="A label word; give it for each label.")],
    demonstrations: Annotated[str | None, typer.Option(help="Such a file with text and label, to show first.")] = None,
    unlabelled: Annotated[str | None, typer.Option(help="Such a file with text to estimate from; else FILE.")] = None,
    estimate: Annotated[int | None, typer.Option(min=1, help="Estimate from so many, drawn; all if left.")] = None,
    scores: Annotated[
        Path | None, typer.Option(help="Keep label scores here; texts that are in it are not scored again.")
    ] = None,
    calibration: Annotated[str, typer.Option(help="none, contextual or prototypical.")] = "prototypical",
    words: Annotated[str, typer.Option(help="first: compare first tokens; all: whole words.")] = "first",
    feature: Annotated[str, typer.Option(help="log, as the paper has it, or clr.")] = "log",
    select: Annotated[str, typer.Option(help="profit, as the paper has it, or likelihood.")] = "profit",
    restarts: Annotated[int, typer.Option(min=1, help="Fits from random starts.")] = 100,
    covariance: Annotated[str, typer.Option(help="full, diag or auto.")] = "auto",
    regularisation: Annotated[float, typer.Option(help="Added to the diagonals of covariances.")] = 1e-6,
    seed: Annotated[int, typer.Option(help="Of starts, and of what is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="Rows of a forward.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")] = False,
) -> None:
    """Classify texts by the label words that a model puts after them, calibrated on unlabelled texts."""
    from torchstone.adapt.calibration import Classifier, check_enough
    from torchstone.adapt.label_scores import kept_scores
    from torchstone.errors import TorchstoneError
    from torchstone.evaluate.records import read_records
    from torchstone.evaluate.scoring import Scorer
    from torchstone.keys import Key
    from torchstone.train.run import RunFolder

    records = read_records(file)
    texts = [record.text("text") for record in records]
    known = {n: record.text("label") for n, record in enumerate(records) if "label" in record.fields}
    if (wrong := next((n for n, word in known.items() if word not in label), None)) is not None:
        raise TorchstoneError(f"{records[wrong].where}: label {known[wrong]!r} is none of {', '.join(label)}")
    shown = read_records(demonstrations) if demonstrations else []
    made = Classifier(
        Scorer.of_run(RunFolder(run), device=device, batch=batch),
        template,
        label,
        demonstrations=[(record.text("text"), record.text("label")) for record in shown],
        calibration=calibration,  # type: ignore[arg-type]
        words=words,  # type: ignore[arg-type]
        feature=feature,  # type: ignore[arg-type]
        select=select,  # type: ignore[arg-type]
        restarts=restarts,
        covariance=covariance,  # type: ignore[arg-type]
        regularisation=regularisation,
        seed=seed,
    )
    own = [record.text("text") for record in read_records(unlabelled)] if unlabelled else []
    drawn = sorted(Key(seed).fold("estimate").numpy().permutation(len(own or texts))[:estimate].tolist())
    if calibration == "prototypical":
        check_enough(len(drawn), len(label))
        every = [*texts, *(own[n] for n in drawn)] if own else texts
    else:
        every = texts
        made.fit()
    every_NC = made.scores(every) if scores is None else kept_scores(made, every, scores)
    if calibration == "prototypical":
        made.fit_scores(every_NC[len(texts) :] if own else every_NC[drawn])
    probability_NC = made.calibrated(every_NC[: len(texts)])
    best_N = probability_NC.argmax(1).tolist()
    right = [label[best_N[n]] == word for n, word in known.items()]
    mixture = made.mixture
    report = {
        "calibration": calibration,
        "feature": feature if mixture else None,
        "select": select if mixture else None,
        "margin": mixture.matching.margin if mixture else None,
        "margin_error": mixture.noise if mixture else None,
        "accuracy": sum(right) / len(right) if right else None,
        "labels": label,
        "predictions": [
            {"text": text, "label": label[best], "probabilities": row}
            for text, best, row in zip(texts, best_N, probability_NC.tolist(), strict=True)
        ],
    }
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
        return
    for text, best, row in zip(texts, best_N, probability_NC.tolist(), strict=True):
        print(f"{label[best]}\t{row[best]:.4f}\t{' '.join(text.split())}")
    if right:
        print(f"accuracy {sum(right) / len(right):.4f} of {len(right)}")
