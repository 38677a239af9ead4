"""How a trained classifier stands attacks: accuracy, and how well each score tells right from wrong predictions.

The attacks know the model whole. Thresholds are those of clean images of the run's own validation
split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from torchstone.errors import TorchstoneError, nearest
from torchstone.files import write_json
from torchstone.keys import Key
from torchstone.train.environment import choose_device
from torchstone.train.run import RunFolder
from torchstone.trust.attacks import (
    ETAS,
    Ball,
    adaptive_pgd,
    carlini_wagner,
    cross_entropy_gain,
    gama,
    multi_target,
    pgd,
    shortfalls,
)
from torchstone.trust.images import images_for
from torchstone.trust.model._classifier import classifies_images
from torchstone.trust.rejection import accuracy_at, auc, calibrate, check_xi, coupled, scores_of

__all__ = ["ATTACKS", "REPORT", "evaluate"]

ATTACKS = ("pgd", "adaptive-pgd", "multi-target", "gama", "cw")
"""Attacks by name; `none` is measured in any case."""
REPORT = "trust.json"


def evaluate(
    run: RunFolder,
    attacks: Sequence[str] = ("pgd",),
    out: str | Path | None = None,
    *,
    data: str | Path | None = None,
    epsilon: float | None = None,
    steps: int = 50,
    restarts: int = 1,
    etas: Sequence[float] = ETAS,
    keep: float = 0.95,
    xi: float = 0.0,
    limit: int | None = None,
    batch: int = 256,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Attack a run's classifier on its test split.

    Args:
        run: of a model of images.
        attacks: of `ATTACKS`. adaptive-pgd needs the auxiliary head; cw looks for the nearest pixels that are wrong
            and, with the head, keep R-Con above the threshold, whatever their distance.
        out: a folder that gets `REPORT`; None writes nothing.
        data: a folder or an .npz file of images, all of which are the test split; None takes the run's own.
        epsilon: by how much a pixel may change; by default as in the run's training.
        steps: of PGD, and of what goes by it.
        restarts: of pgd, adaptive-pgd and gama, each from noise of its own.
        etas: weights of log R-Con in adaptive-pgd; of the runs, the worst for each example counts.
        keep: share of right predictions that a threshold keeps.
        xi: of the coupled rule.
        limit: examples of the test split, spread evenly; None takes all.
        batch: examples at once.
        device: auto, cpu, cuda, cuda:N or mps.
        seed: of the noise.

    Returns:
        ``examples``, ``epsilon``, ``steps``, ``thresholds`` by score, and ``attacks``: for each ``accuracy``, by score
        ``auc``, ``accuracy_at_95``, ``accuracy_at_99``, and by rule the share ``accepted`` and the ``accuracy`` of
        those; of cw ``evaded``, the share, and the median ``distance`` in L2.

    Raises:
        TorchstoneError: no such attack, or one that the model has no head for; a model of no images; epsilon unknown.
    """
    spec = run.require().model_spec
    if not classifies_images(spec):
        raise TorchstoneError(f"{run.path}: its model ({spec.kind}) is no classifier of images")
    for name in attacks:
        if name not in ATTACKS:
            raise TorchstoneError(f"no attack {name!r}{nearest(name, ATTACKS)}; attacks: {', '.join(ATTACKS)}")
    if "adaptive-pgd" in attacks and getattr(spec, "rejection", None) is None:
        raise TorchstoneError(
            f"{run.path}: adaptive-pgd attacks the auxiliary head, which the model lacks; train with model.rejection "
            "and objective rectified_rejection"
        )
    numbers = (("steps", steps), ("restarts", restarts), ("batch", batch), ("limit", 1 if limit is None else limit))
    for field, value in numbers:
        if value < 1:
            raise TorchstoneError(f"{field}: is {value}, and must be 1 or more")
    if not etas or not all(0 <= eta < math.inf for eta in etas):
        raise TorchstoneError("eta: needs one weight of log R-Con or more, each a number from 0 up")
    check_xi(xi)
    if out is not None and Path(out).is_file():
        raise TorchstoneError(f"{out}: is a file, not a folder")
    recipe = run.recipe
    size = getattr(recipe.objective, "epsilon", 0.0) if epsilon is None else epsilon
    if not 0 < size <= 1:
        raise TorchstoneError("epsilon: must be above 0 and at most 1; a run that was trained without needs it said")
    where = choose_device(device)
    model: Any = run.model(device=where)
    own = recipe.data.prepare()
    prepared = own if data is None else images_for(spec, data, getattr(recipe.data, "image", None))
    if not len(prepared.test):
        raise TorchstoneError(f"{run.path}: its data have no test split to attack")

    def batches(split: Any, most: int | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(one["pixels"].to(where), one["label"].to(where)) for one in split.evaluation(batch, most)]

    valid = _scored(model, batches(own.valid, None))
    thresholds = {}
    if valid is not None and bool(valid[1].any()):
        thresholds = {name: calibrate(score_B, valid[1], keep) for name, score_B in valid[0].items()}
    test, ball, key = batches(prepared.test, limit), Ball(size), Key(seed).fold("trust")
    report: dict[str, Any] = {}
    for name in ("none", *attacks):
        attacked, distances = [], []
        for number, (pixels, label_B) in enumerate(test):
            drawn = key.fold(name, number)
            if name == "pgd":
                gain = cross_entropy_gain(model, label_B)
                pixels = pgd(gain, pixels, ball, steps, restarts=restarts, key=drawn)
            elif name == "adaptive-pgd":
                pixels = adaptive_pgd(model, pixels, label_B, ball, etas, steps, restarts=restarts, key=drawn)
            elif name == "multi-target":
                pixels = multi_target(model, pixels, label_B, ball, steps=steps, key=drawn)
            elif name == "gama":
                pixels = gama(model, pixels, label_B, ball, steps, restarts=restarts, key=drawn)
            elif name == "cw":
                pixels, distance_B = carlini_wagner(shortfalls(model, label_B, thresholds.get("rcon")), pixels)
                distances.append(distance_B)
            attacked.append((pixels, label_B))
        found = _scored(model, attacked)
        assert found is not None
        report[name] = _row(*found, thresholds, xi)
        if distances:
            distance_B = torch.cat(distances)
            report[name] |= {
                "evaded": float(distance_B.isfinite().double().mean()),
                "distance": _finite(float(distance_B.median())),
            }
    found_all = {
        "run": str(run.path),
        "data": prepared.description,
        "examples": sum(len(label_B) for _, label_B in test),
        "epsilon": size,
        "steps": steps,
        "restarts": restarts,
        "etas": list(etas),
        "keep": keep,
        "xi": xi,
        "thresholds": thresholds,
        "attacks": report,
    }
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_json(Path(out) / REPORT, found_all)
    return found_all


@torch.no_grad()
def _scored(
    model: Any, batches: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[dict[str, torch.Tensor], torch.Tensor] | None:
    """Scores of all examples by name, and which predictions are right; None of no example."""
    rows, right = [], []
    for pixels, label_B in batches:
        out = model(pixels)
        rows.append(scores_of(out).items())
        right.append(out.logits.argmax(1) == label_B)
    if not rows:
        return None
    return {name: torch.cat([row[name] for row in rows]).cpu() for name in rows[0]}, torch.cat(right).cpu()


def _row(
    scores: dict[str, torch.Tensor], right_B: torch.Tensor, thresholds: dict[str, float], xi: float
) -> dict[str, Any]:
    rules = {name: scores[name] >= threshold for name, threshold in thresholds.items()}
    if "rcon" in scores:
        rules["coupled"] = coupled(scores["con"], scores["rcon"], xi)
    return {
        "accuracy": float(right_B.double().mean()),
        "scores": {
            name: {
                "auc": _finite(auc(score_B, right_B)),
                "accuracy_at_95": _finite(accuracy_at(score_B, right_B, 0.95)),
                "accuracy_at_99": _finite(accuracy_at(score_B, right_B, 0.99)),
            }
            for name, score_B in scores.items()
        },
        "rules": {
            name: {
                "accepted": float(accepted_B.double().mean()),
                "accuracy": float(right_B[accepted_B].double().mean()) if bool(accepted_B.any()) else None,
            }
            for name, accepted_B in rules.items()
        },
    }


def _finite(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None
