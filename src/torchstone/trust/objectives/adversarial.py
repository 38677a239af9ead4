"""Adversarial training: the loss at the worst pixels near an image, found anew at every step.

    pgd_at   CE(f(x'), y), x' = argmax CE(f(x'), y)                                 Madry et al. 2018, arXiv 1706.06083
    trades   CE(f(x), y) + beta KL(f(x) || f(x')), x' = argmax KL(f(x) || f(x'))     Zhang et al. 2019, arXiv 1901.08573

The search takes signed gradient steps from noise that `prepare` draws, so the noise is a batch's, whatever
micro-batches and ranks it is divided between, and validation is attacked from the same noise every time. It runs in the
mode in which the model is (batch statistics in training, as in Pang et al. 2022; running ones in evaluation), and
leaves parameters' gradients and running statistics alone.

B examples, C classes; pixels are (B, channels, I, I), from 0 to 1.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, model_validator
from torch import nn

from torchstone.data.blocks import IGNORE
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.context import Aux, add_aux
from torchstone.objectives import Batch, Facts, Objective, ObjectiveSpec, Result, Term
from torchstone.ops import at_least_float32
from torchstone.trust.attacks import Ball, ascend, cross_entropy_gain, divergence_gain, uniform
from torchstone.trust.model._classifier import Classified, ClassifierSpec, classifies_images

__all__ = ["Adversarial", "AdversarialSpec", "Distance"]


def _fraction(value: Any) -> Any:
    """``8/255`` as a number: pixels are counted in bytes."""
    try:
        return float(Fraction(value)) if isinstance(value, str) and "/" in value else value
    except (ValueError, ZeroDivisionError):
        return value


Distance = Annotated[float, BeforeValidator(_fraction)]
"""A difference of pixels whose values lie from 0 to 1; in a recipe also a fraction, as 8/255."""
_NEAR = 1e-3
"""Standard deviation of the noise from which TRADES starts."""


class AdversarialSpec(ObjectiveSpec):
    """Classify images that an attack has changed by a little (PGD-AT, TRADES)."""

    example: ClassVar[str | None] = "images"
    paper: ClassVar[str] = "Madry et al. 2018, arXiv 1706.06083; Zhang et al. 2019, arXiv 1901.08573"

    host: Literal["pgd_at", "trades"] = "pgd_at"
    """What is minimised: cross-entropy of attacked images, or of clean ones and a divergence between the two."""
    epsilon: Distance = Field(8 / 255, ge=0, le=1)
    """By how much the attack may change a pixel; 0 is training without an attack."""
    steps: int = Field(10, ge=1, le=10**4)
    """Steps of the attack."""
    step_size: Distance | None = Field(None, gt=0, le=1)
    """Size of a step; null is a quarter of epsilon."""
    random_start: bool = True
    """Whether the attack starts at random (pgd_at: uniform in the ball; trades: near the image) or at the image."""
    beta: float = Field(6.0, ge=0, le=1e4)
    """Weight of the divergence of trades."""

    @model_validator(mode="after")
    def _slope(self) -> AdversarialSpec:
        if self.host == "trades" and not self.random_start:
            raise ValueError("random_start: trades needs it, for its divergence has no slope at the image itself")
        return self

    def build(self, facts: Facts) -> Objective:
        return Adversarial(self, facts.classes)


class Adversarial(Objective):
    """Batch: pixels (B, channels, I, I); label (B,), -100 where an example does not count. `prepare` adds `noise`, of
    the shape of pixels, from which the attack starts."""

    def __init__(self, spec: AdversarialSpec, classes: int | None = None) -> None:
        super().__init__()
        self.spec, self.classes = spec, classes

    def check(self, model: nn.Module) -> None:
        if not classifies_images(getattr(model, "spec", None)):
            raise TorchstoneError(f"objective {self.spec.kind}: needs a model of images, as mlp or preact_resnet")
        spec: Any = model.spec
        sized: Any = spec if isinstance(spec, ClassifierSpec) else spec.head
        if self.classes is not None and sized.classes < self.classes:
            raise TorchstoneError(
                f"objective {self.spec.kind}: the data have {self.classes} classes, the model {sized.classes}"
            )

    def prepare(self, batch: Batch, key: Key) -> Batch:
        if "pixels" not in batch:
            raise TorchstoneError(f"objective {self.spec.kind}: needs images with labels; set data.kind: images")
        pixels, drawn = batch["pixels"], key.fold("attack")
        if not self.spec.epsilon or not self.spec.random_start:
            return batch
        if self.spec.host == "pgd_at":
            return {**batch, "noise": uniform(pixels, self.spec.epsilon, drawn)}
        noise = _NEAR * torch.randn(pixels.shape, generator=drawn.generator())
        return {**batch, "noise": noise.to(pixels.device, pixels.dtype)}

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        examples = (batch["label"] != IGNORE).sum()
        return {"examples": examples, "tokens": examples}  # no part of an image is counted for itself

    def attack(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The worst pixels found near those of the batch."""
        pixels, label_B, spec = batch["pixels"], batch["label"], self.spec
        if not spec.epsilon:
            return pixels
        if spec.host == "pgd_at":
            gain = cross_entropy_gain(model, label_B)
        else:
            with torch.no_grad():
                gain = divergence_gain(model, model(pixels).logits)
        start = pixels + batch["noise"] if "noise" in batch else pixels
        size = spec.epsilon / 4 if spec.step_size is None else spec.step_size
        return ascend(gain, pixels, start, Ball(spec.epsilon), spec.steps, size)

    def forward(self, model: nn.Module, batch: Batch, key: Key | None) -> Result:
        return self._result(model, batch, key)[0]

    def evaluate(self, model: nn.Module, batch: Batch, predict: bool = False) -> Result:
        result, out = self._result(model, batch, None)
        return replace(result, scores=self.scores(model, batch, out))

    def scores(self, model: nn.Module, batch: Batch, out: Classified) -> Aux:
        """What evaluation reports, of `out` on the attacked images: accuracy without and under the attack."""
        if not self.spec.epsilon:
            return {"accuracy": hits(out, batch["label"])}
        clean = hits(model(batch["pixels"]), batch["label"])
        return {"accuracy": clean, "robust_accuracy": hits(out, batch["label"])}

    def _result(self, model: nn.Module, batch: Batch, key: Key | None) -> tuple[Result, Classified]:
        """The host's terms, and what the model says of the attacked images. The attack itself drops nothing."""
        label_B, pixels = batch["label"], self.attack(model, batch)
        drop = None if key is None else key.tensor(pixels.device)
        out: Classified = model(pixels, key=drop)
        logits_BC, aux = at_least_float32(out.logits), out.aux
        if self.spec.host == "pgd_at":
            terms = {"cross_entropy": Term(_cross_entropy(logits_BC, label_B), "examples")}
        else:
            clean: Classified = model(batch["pixels"], key=drop)
            clean_BC, aux = at_least_float32(clean.logits), add_aux(aux, clean.aux)
            kl_B = F.kl_div(logits_BC.log_softmax(1), clean_BC.log_softmax(1), reduction="none", log_target=True).sum(1)
            kl = torch.where(label_B != IGNORE, kl_B, 0.0).sum()
            terms = {
                "cross_entropy": Term(_cross_entropy(clean_BC, label_B), "examples"),
                "divergence": Term(kl, "examples", self.spec.beta),
            }
        return Result.of(terms, {**aux, "attacked_accuracy": hits(out, label_B)}), out


def hits(out: Classified, label_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many examples are classified as labelled, and how many count."""
    return (out.logits.argmax(1) == label_B).sum(), (label_B != IGNORE).sum()


def _cross_entropy(logits_BC: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_BC, label_B, reduction="sum", ignore_index=IGNORE)
