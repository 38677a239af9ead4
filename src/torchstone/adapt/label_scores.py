"""A file of label scores: what a `Classifier` found for each text, so that no text passes the model twice.

JSON lines. The first record says what the scores were made with: the run's weights, template, labels, demonstrations,
what stands between these, and whether first tokens or whole words are compared. Each other record is a text with its C
log-probabilities in nats, one for each label in the order of the labels::

    {"weights": "3f9c...", "template": "{x}:{y}", "labels": ["bad", "good"], "demonstrations": [], ...}
    {"text": "warm", "scores": [-6.2, -4.9]}

Calibrations of all kinds begin with these scores, so one file serves them all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchstone.adapt.calibration import Classifier
from torchstone.errors import TorchstoneError
from torchstone.evaluate.records import Record, read_records
from torchstone.files import write_bytes
from torchstone.objectives._frozen import fingerprint

__all__ = ["kept_scores"]


def kept_scores(classifier: Classifier, texts: Sequence[str], path: Path) -> np.ndarray:
    """What ``classifier.scores(texts)`` gives (N, C): of texts in the file from there, of others from the model, which
    are added to it. The file is made if it is not there, and is written once, after everything is scored.

    Raises:
        TorchstoneError: the file holds scores that were made with something else, or is none of scores; a text that
            does not fit into the window. The file is then as it was.
    """
    if path.suffix == ".tsv":
        raise TorchstoneError(f"scores: {str(path)!r} would hold JSON lines; give it another name than a table's")
    if not path.parent.is_dir():
        raise TorchstoneError(f"scores: no folder {str(path.parent)!r} to write {path.name!r} into")
    origin = _origin(classifier)
    known = _read(path, origin) if path.exists() else {}
    new = [text for text in dict.fromkeys(texts) if text not in known]
    if new:
        known |= dict(zip(new, classifier.scores(new).tolist(), strict=True))
        rows = [origin, *({"text": text, "scores": scores} for text, scores in known.items())]
        write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return np.array([known[text] for text in texts], np.float64)


def _origin(classifier: Classifier) -> dict[str, Any]:
    """What scores depend on; the first record of a file."""
    return {
        "weights": fingerprint(classifier.scorer.model),
        "template": classifier.template,
        "labels": list(classifier.labels),
        "demonstrations": [list(pair) for pair in classifier.demonstrations],
        "between": classifier.between,
        "words": classifier.words,
    }


def _read(path: Path, origin: dict[str, Any]) -> dict[str, list[float]]:
    """Scores by text of a file whose first record is `origin`."""
    first, *rows = read_records(str(path))
    if absent := next((name for name in origin if name not in first.fields), None):
        raise TorchstoneError(f"{first.where}: no file of label scores, {absent} is not said; choose another file")
    if other := [name for name in origin if first.fields[name] != origin[name]]:
        raise TorchstoneError(
            f"{first.where}: its scores were made with other {' and '.join(other)}; choose another file for these"
        )
    return {row.text("text"): _numbers(row, len(origin["labels"])) for row in rows}


def _numbers(row: Record, count: int) -> list[float]:
    scores = row.get("scores")
    there = isinstance(scores, list) and len(scores) == count
    if not there or not all(type(score) in (int, float) and math.isfinite(score) for score in scores):
        raise TorchstoneError(f"{row.where}: field 'scores' needs a finite number for each of {count} labels")
    return list(scores)
