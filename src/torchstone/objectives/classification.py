"""Classification: cross-entropy of one label an example, of texts or of pictures.

B examples, N of them with a label, T tokens, C classes.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.objectives import Batch, Facts, Objective, ObjectiveSpec, Result, Term, tokens_of
from torchstone.ops import at_least_float32

__all__ = ["Classification", "ClassificationObjectiveSpec"]


class ClassificationObjectiveSpec(ObjectiveSpec):
    """Predict the class of each example."""

    example: ClassVar[str | None] = None

    smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of a target that is spread over all classes."""

    def build(self, facts: Facts) -> Objective:
        if facts.classes is None:
            raise TorchstoneError("objective classification: needs data with labels (data: labelled, images)")
        return Classification(self, facts.classes)


class Classification(Objective):
    """Batch: label (B,), below zero where there is none, and ids (B, T) or pixels. The model's logits are (B, C)."""

    def __init__(self, spec: ClassificationObjectiveSpec, classes: int) -> None:
        super().__init__()
        self.spec, self.classes = spec, classes

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        examples = (batch["label"] >= 0).sum()
        return {"examples": examples, "tokens": batch["valid"].sum() if "valid" in batch else examples}

    def forward(self, model: nn.Module, batch: Batch, key: Key | None) -> Result:
        inputs = batch["pixels"] if "pixels" in batch else tokens_of(batch)
        out = model(inputs, key=None if key is None else key.tensor(batch["label"].device))
        if out.logits.shape != (len(batch["label"]), self.classes):
            raise TorchstoneError(
                f"objective {self.spec.kind}: the data have {self.classes} classes, and the model's logits are "
                f"{tuple(out.logits.shape)}; set model.head: {{kind: classification, classes: {self.classes}}}"
            )
        known = batch["label"] >= 0
        logits_NC = at_least_float32(out.logits[known])
        terms = {"loss": Term(self.loss(logits_NC, batch, known), "examples")}
        found = Result.of(terms, getattr(out, "aux", {}))
        found.metrics["accuracy"] = (logits_NC.argmax(-1) == batch["label"][known]).sum(), known.sum()
        return found

    def loss(self, logits_NC: torch.Tensor, batch: Batch, known_B: torch.Tensor) -> torch.Tensor:
        """Sum over the examples with a label, those where `known_B`, of which there are scores."""
        return F.cross_entropy(logits_NC, batch["label"][known_B], reduction="sum", label_smoothing=self.spec.smoothing)

    def evaluate(self, model: nn.Module, batch: Batch, predict: bool = False) -> Result:
        found = self(model, batch, None)
        return Result(found.terms, found.metrics, scores={"accuracy": found.metrics["accuracy"]})
