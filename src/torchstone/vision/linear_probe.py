"""A linear probe: how far a linear map of what a frozen encoder makes of a picture tells its class (Bao et al. 2022,
arXiv 2106.08254, section 3.4).

    features = mean over patches of a layer's states;   class = argmax of multinomial logistic regression on them

Features are scaled to mean 0 and deviation 1 on train; the weight of the penalty is chosen on valid. Needs scikit-learn
(extra `claims`).

B pictures, N patches, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torchstone.errors import TorchstoneError
from torchstone.model.embedding.patch import PatchEmbedding
from torchstone.model.taps import Taps
from torchstone.model.transformer import Transformer

__all__ = ["Probed", "features", "probe"]

_STRENGTHS = (0.01, 0.1, 1.0, 10.0)
"""Inverse weights of the penalty, of which the best on valid is taken."""


@dataclass(frozen=True)
class Probed:
    """What a probe finds.

    Attributes:
        accuracy: on test.
        valid: accuracy on valid; None without such pictures.
        train, test: how many pictures.
        strength: inverse weight of the penalty.
        layer: whose states were taken; None is after the last norm.
        width: numbers of a picture.
    """

    accuracy: float
    valid: float | None
    train: int
    test: int
    strength: float
    layer: int | None
    width: int


def _check(model: Any) -> None:
    if not isinstance(model, Transformer) or not isinstance(model.embedding, PatchEmbedding) or model.encoder is None:
        raise TorchstoneError(
            "probe: needs an encoder over patches (a transformer with embedding patch, causal: false)"
        )


@torch.no_grad()
def features(model: Any, pixels_BCII: torch.Tensor, layer: int | None = None) -> torch.Tensor:
    """The mean of a picture's patches (B, D), after a layer (from 0; negative ones count from the end), or after the
    encoder's last norm.

    Raises:
        TorchstoneError: the model is no encoder of pictures, or has no such layer.
    """
    _check(model)
    depth, patches = len(model.encoder.layers), model.embedding.spec.side**2
    if layer is None:
        return model(pixels_BCII, outputs="none").hidden[:, -patches:].mean(1)
    if not -depth <= layer < depth:
        raise TorchstoneError(f"layer: no layer {layer} among {depth}")
    path = f"encoder.layers.{layer % depth}.x"
    taps = Taps(record=[path])
    model(pixels_BCII, outputs="none", taps=taps)
    return taps.seen[path][:, -patches:].mean(1)


def probe(model: Any, prepared: Any, *, layer: int | None = None, batch: int = 256) -> Probed:
    """Fit the probe on the train split of labelled pictures and measure it on test.

    Args:
        model: an encoder over patches.
        prepared: splits of labelled pictures, as data `images` prepares them.
        layer: as of `features`.
        batch: pictures at once.

    Raises:
        TorchstoneError: scikit-learn is missing; a split or the labels are; the model is no encoder of pictures.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise TorchstoneError("probe: needs scikit-learn: pip install 'torchstone[claims]'") from None
    _check(model)
    if not len(prepared.test):
        raise TorchstoneError("probe: the data have no test split")
    device = next(model.parameters()).device

    def read(batches: Iterable[dict[str, torch.Tensor]]) -> tuple[np.ndarray, np.ndarray]:
        rows = [(features(model, each["pixels"].to(device), layer), each["label"]) for each in batches]
        return torch.cat([x for x, _ in rows]).cpu().double().numpy(), torch.cat([y for _, y in rows]).numpy()

    model.eval()
    x, y = read(prepared.train.evaluation(batch))
    test_x, test_y = read(prepared.test.evaluation(batch))
    if (y < 0).any() or len(np.unique(y)) < 2:
        raise TorchstoneError("probe: needs pictures of two classes or more, with labels")
    mean, scale = x.mean(0), x.std(0) + 1e-12

    def fitted(strength: float) -> Any:
        regression = LogisticRegression(C=strength, max_iter=1000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a regression that has not quite converged is as good
            return regression.fit((x - mean) / scale, y)

    made = {strength: fitted(strength) for strength in (_STRENGTHS if len(prepared.valid) else (1.0,))}
    valid = None
    strength = next(iter(made))
    if len(prepared.valid):
        valid_x, valid_y = read(prepared.valid.evaluation(batch))
        scores = {each: float(one.score((valid_x - mean) / scale, valid_y)) for each, one in made.items()}
        strength = max(scores, key=lambda each: scores[each])
        valid = scores[strength]
    accuracy = float(made[strength].score((test_x - mean) / scale, test_y))
    return Probed(accuracy, valid, len(y), len(test_y), strength, layer, x.shape[1])
