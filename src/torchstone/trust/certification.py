"""What randomised smoothing certifies of a run's classifier, on its test split or on other images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from torchstone.errors import TorchstoneError
from torchstone.files import write_json
from torchstone.keys import Key
from torchstone.train.environment import choose_device
from torchstone.train.run import RunFolder
from torchstone.trust.images import images_for
from torchstone.trust.model._classifier import classifies_images
from torchstone.trust.smoothing import (
    ABSTAIN,
    Certified,
    SmoothedClassifier,
    average_certified_radius,
    certified_accuracy,
    largest_radius,
)

__all__ = ["RADII", "REPORT", "certify"]

REPORT = "certified.json"
RADII = (0.0, 0.25, 0.5, 0.75, 1.0)


def certify(
    run: RunFolder,
    out: str | Path | None = None,
    *,
    data: str | Path | None = None,
    sigma: float | None = None,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    beta: float | None = None,
    radii: Sequence[float] = RADII,
    limit: int | None = None,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Certify a run's classifier under Gaussian noise.

    Args:
        run: of a model of images.
        out: a folder that gets `REPORT`; None writes nothing.
        data: a folder or an .npz file of images, all of which are the test split; None takes the run's own.
        sigma: of the noise; by default as in the run's training.
        n0, n, alpha, beta: see `SmoothedClassifier.certify`.
        radii: at which certified accuracy is reported.
        limit: examples of the test split, spread evenly; None takes all.
        device: auto, cpu, cuda, cuda:N or mps.
        seed: of the noise.

    Returns:
        what was asked, ``average_certified_radius``, ``certified_accuracy`` in the order of ``radii``, the share
        ``abstained``, the ``largest_radius`` that n samples can certify, and by example ``label``, ``predicted``
        (-1 where it abstains) and ``radius``.
    """
    spec = run.require().model_spec
    if not classifies_images(spec):
        raise TorchstoneError(f"{run.path}: its model ({spec.kind}) is no classifier of images")
    if limit is not None and limit < 1:
        raise TorchstoneError(f"limit: is {limit}, and must be 1 or more")
    if not radii or not all(0 <= radius < math.inf for radius in radii):
        raise TorchstoneError("radius: needs one or more, each a number from 0 up")
    if out is not None and Path(out).is_file():
        raise TorchstoneError(f"{out}: is a file, not a folder")
    recipe = run.recipe
    noise = getattr(recipe.objective, "sigma", None) if sigma is None else sigma
    if noise is None:
        raise TorchstoneError("sigma: a run that was trained without noise needs it said")
    where = choose_device(device)
    smoothed = SmoothedClassifier(run.model(device=where).eval(), noise)
    prepared = recipe.data.prepare() if data is None else images_for(spec, data, getattr(recipe.data, "image", None))
    if not len(prepared.test):
        raise TorchstoneError(f"{run.path}: its data have no test split to certify")
    found: list[Certified] = []
    labels: list[torch.Tensor] = []
    key = Key(seed).fold("certify")
    for batch in prepared.test.evaluation(256, limit):
        done = sum(map(len, labels))
        pixels = batch["pixels"].to(where)
        found.append(smoothed.certify(pixels, n0, n, alpha, beta, key=key, first=done))
        labels.append(batch["label"])
    label_N = torch.cat(labels)
    all_N = Certified(torch.cat([one.label for one in found]), torch.cat([one.radius for one in found]))
    report = {
        "run": str(run.path),
        "data": prepared.description,
        "examples": len(label_N),
        "sigma": noise,
        "n0": n0,
        "n": n,
        "alpha": alpha,
        "beta": beta,
        "seed": seed,
        "average_certified_radius": average_certified_radius(all_N, label_N),
        "radii": list(radii),
        "certified_accuracy": certified_accuracy(all_N, label_N, radii),
        "abstained": float((all_N.label == ABSTAIN).double().mean()),
        "largest_radius": largest_radius(noise, n, alpha, soft=beta is not None),
        "label": label_N.tolist(),
        "predicted": all_N.label.tolist(),
        "radius": all_N.radius.tolist(),
    }
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_json(Path(out) / REPORT, report)
    return report
