"""Classification of pictures that vary from epoch to epoch: crops, mirrors, colours (`views`), two in one (`mixing`).

Evaluation is that of `classification`: whole pictures, one label each. In both, pictures get the size that the model's
patches are cut from (`embedding.image`), and keep their own where it has none.

B pictures, N of them with a label, C classes.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.objectives import Batch, Facts, Objective
from torchstone.objectives.classification import Classification, ClassificationObjectiveSpec
from torchstone.vision.mixing import MixingSpec
from torchstone.vision.views import ViewsSpec

__all__ = ["ImageClassification", "ImageClassificationSpec"]


class ImageClassificationSpec(ClassificationObjectiveSpec):
    """Predict the class of each picture, of which training sees another version in each epoch."""

    example: ClassVar[str | None] = "images"

    views: ViewsSpec = ViewsSpec()
    """How pictures vary from epoch to epoch."""
    mixing: MixingSpec = MixingSpec()
    """How pictures of a batch are mixed."""

    def build(self, facts: Facts) -> Objective:
        if facts.classes is None:
            raise TorchstoneError("objective image_classification: needs pictures with labels (data: images)")
        return ImageClassification(self, facts.classes, getattr(getattr(facts.model, "embedding", None), "image", None))


class ImageClassification(Classification):
    """Batch: label (B,) and pixels, which `prepare` makes the size `image`. In training it adds `second` (B,), the
    label of the picture of which there is less, and `share` (B,), what the first one has."""

    spec: ImageClassificationSpec

    def __init__(self, spec: ImageClassificationSpec, classes: int, image: int | None = None) -> None:
        super().__init__(spec, classes)
        self.image = image

    def prepare(self, batch: Batch, key: Key) -> Batch:
        size = self.image or batch["pixels"].shape[-1]
        (pixels,) = self.spec.views.draw(batch["pixels"], (size,), key.fold("views") if self.training else None)
        if not self.training:
            return {**batch, "pixels": pixels}
        pixels, label, second, share = self.spec.mixing.draw(pixels, batch["label"], key.fold("mixing"))
        return {**batch, "pixels": pixels, "label": label, "second": second, "share": share}

    def loss(self, logits_NC: torch.Tensor, batch: Batch, known_B: torch.Tensor) -> torch.Tensor:
        if "share" not in batch:
            return super().loss(logits_NC, batch, known_B)
        one_N, other_N = (
            F.cross_entropy(logits_NC, batch[name][known_B], reduction="none", label_smoothing=self.spec.smoothing)
            for name in ("label", "second")
        )
        share_N = batch["share"][known_B]
        return (share_N * one_N + (1 - share_N) * other_N).sum()
