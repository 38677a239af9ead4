"""MACER (Zhai et al. 2020, arXiv 2001.02378): a classifier of images whose certified radius under Gaussian noise is
itself maximised, without an attack.

Of K noisy copies x + d_k, d_k ~ N(0, sigma^2 I), with logits u_k and label y,

    L_C = -log(mean_k softmax(u_k)_y + 1e-10)
    s   = mean_k softmax(beta u_k), s1 >= s2 its two largest values, c1 the class of s1
    xi  = Phi^-1(s1) - Phi^-1(s2)                              sigma xi / 2 is the radius of the soft classifier
    L_R = sigma / 2 (gamma - xi)   where c1 = y, 0 < s2, s1 < 1 and xi <= gamma;  0 elsewhere
    L   = mean over all examples of L_C + weight L_R

A radius is raised only where the prediction is right, and only up to gamma, near which the slope of Phi^-1 explodes.
`weight: 0` with one copy is training on Gaussian noise (Cohen et al. 2019, arXiv 1902.02918); with more copies
the noise is averaged inside the logarithm. Noise is added to pixels, so that what standardises them belongs into the
model (`model.mean`, `model.std`). The noise of a batch is drawn by `prepare`, all copies at once.

B examples, K copies, C classes; pixels are (B, channels, I, I).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from torchstone.data.blocks import IGNORE
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.objectives import Batch, Facts, Objective, ObjectiveSpec, Result, Term
from torchstone.ops import at_least_float32
from torchstone.trust.model._classifier import Classified, ClassifierSpec, classifies_images

__all__ = ["MACER", "MACERSpec"]

_FLOOR = 1e-10
"""Added to the averaged probability, whose logarithm is bounded by it."""


class MACERSpec(ObjectiveSpec):
    """Classify noisy images, and widen the radius within which the smoothed classifier cannot be changed."""

    example: ClassVar[str | None] = "images"
    paper: ClassVar[str] = "Zhai et al. 2020, arXiv 2001.02378"

    sigma: float = Field(0.25, gt=0, le=100)
    """Standard deviation of the noise on a pixel, whose values lie from 0 to 1."""
    copies: int = Field(16, ge=1, le=10**4)
    """Noisy copies of each image (k)."""
    beta: float = Field(16.0, gt=0, le=1e4)
    """Inverse temperature of the softmax that the radius is measured with."""
    gamma: float = Field(8.0, gt=0, le=100)
    """Up to where the radius is raised, in units of sigma / 2."""
    weight: float = Field(12.0, ge=0, le=1e4)
    """Weight of the radius (lambda); 0 is training on noise alone."""
    weight_from: int = Field(0, ge=0, lt=10**8)
    """Step from which the radius has its weight; before it the weight is 0."""

    def build(self, facts: Facts) -> Objective:
        return MACER(self, facts.classes)


class MACER(Objective):
    """Batch: pixels (B, channels, I, I); label (B,), -100 where an example does not count. `prepare` adds `noise`,
    (B, K, channels, I, I), of standard deviation 1."""

    def __init__(self, spec: MACERSpec, classes: int | None = None) -> None:
        super().__init__()
        self.spec, self.classes, self.step = spec, classes, 0

    def before_step(self, model: nn.Module, step: int) -> None:
        self.step = step

    def check(self, model: nn.Module) -> None:
        if not classifies_images(getattr(model, "spec", None)):
            raise TorchstoneError(f"objective {self.spec.kind}: needs a model of images, as mlp or preact_resnet")
        spec: Any = model.spec
        sized: Any = spec if isinstance(spec, ClassifierSpec) else spec.head
        if sized.classes < max(2, self.classes or 2):
            raise TorchstoneError(
                f"objective {self.spec.kind}: needs {max(2, self.classes or 2)} classes, the model has {sized.classes}"
            )

    def prepare(self, batch: Batch, key: Key) -> Batch:
        if "pixels" not in batch:
            raise TorchstoneError(f"objective {self.spec.kind}: needs images with labels; set data.kind: images")
        pixels = batch["pixels"]
        shape = (pixels.shape[0], self.spec.copies, *pixels.shape[1:])
        noise = torch.randn(shape, generator=key.fold("noise").generator(), dtype=torch.float32)
        return {**batch, "noise": noise.to(pixels.device, pixels.dtype)}

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        examples = (batch["label"] != IGNORE).sum()
        return {"examples": examples, "tokens": examples}  # no part of an image is counted for itself

    def radius(self, logits_BKC: torch.Tensor, label_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """xi, and where it is raised, both (B,); xi is 0 where it is not finite."""
        s_B2, class_B2 = (self.spec.beta * logits_BKC).softmax(-1).mean(1).topk(2)
        finite_B = ((s_B2 > 0) & (s_B2 < 1)).all(1)
        # what is not finite is replaced ahead of Phi^-1, or its gradient would be NaN times zero
        quantile_B2 = torch.special.ndtri(torch.where(finite_B[:, None], s_B2, 0.5))
        xi_B = quantile_B2[:, 0] - quantile_B2[:, 1]
        return xi_B, (class_B2[:, 0] == label_B) & finite_B & (xi_B <= self.spec.gamma)

    def forward(self, model: nn.Module, batch: Batch, key: Key | None) -> Result:
        return self._result(model, batch, key)

    def evaluate(self, model: nn.Module, batch: Batch, predict: bool = False) -> Result:
        """Cross-entropy alone, so that weights can be compared by it."""
        result = self._result(model, batch, None)
        terms = {"cross_entropy": result.terms["cross_entropy"]}
        clean: Classified = model(batch["pixels"])
        right_B, known_B = clean.logits.argmax(1) == batch["label"], batch["label"] != IGNORE
        scores = {"accuracy": (right_B.sum(), known_B.sum()), "noisy_accuracy": result.metrics["noisy_accuracy"]}
        return replace(Result.of(terms, result.metrics), scores=scores)

    def _result(self, model: nn.Module, batch: Batch, key: Key | None) -> Result:
        label_B, known_B = batch["label"], batch["label"] != IGNORE
        copies = batch["pixels"][:, None] + self.spec.sigma * batch["noise"]
        drop = None if key is None else key.tensor(copies.device)
        out: Classified = model(copies.flatten(0, 1), key=drop)
        logits_BKC = at_least_float32(out.logits).unflatten(0, copies.shape[:2])
        probs_BC = logits_BKC.softmax(-1).mean(1)
        ce_B = -(probs_BC.gather(1, label_B.clamp(min=0)[:, None])[:, 0] + _FLOOR).log()
        xi_B, active_B = self.radius(logits_BKC, label_B)
        short_B = torch.where(active_B, self.spec.sigma / 2 * (self.spec.gamma - xi_B), 0.0)
        weight = self.spec.weight if self.step >= self.spec.weight_from else 0.0
        terms = {
            "cross_entropy": Term(torch.where(known_B, ce_B, 0.0).sum(), "examples"),
            "radius": Term(short_B.sum(), "examples", weight),
        }
        metrics = {
            "noisy_accuracy": ((probs_BC.argmax(1) == label_B).sum(), known_B.sum()),
            "active": (active_B.sum(), known_B.sum()),
        }
        return Result.of(terms, {**out.aux, **metrics})
