"""A network of dense layers on all pixels at once: the smallest classifier, for small images."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from torchstone.trust.model._classifier import Classifier, ClassifierSpec, Passing, dense

__all__ = ["MLPSpec"]


class MLPSpec(ClassifierSpec):
    """Dense layers with ReLU over all pixels of an image."""

    hidden: tuple[Annotated[int, Field(ge=1, le=2**20)], ...] = Field((128, 128), min_length=1, max_length=64)
    """Sizes of the hidden layers; the last one's values are the features."""

    def build(self) -> nn.Module:
        inputs = self.size("channels") * self.size("image") ** 2
        return Classifier(self, _Layers(inputs, self.hidden), self.hidden[-1])


class _Layers(nn.Module):
    """(B, channels, I, I) -> (B, D). Taps: ``layers.0``, ... behind each ReLU."""

    def __init__(self, inputs: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(dense(a, b, "up") for a, b in zip((inputs, *hidden), hidden, strict=False))

    def forward(self, pixels: torch.Tensor, passing: Passing) -> torch.Tensor:
        h_BD = pixels.flatten(1)
        for number, layer in enumerate(self.layers):
            h_BD = passing.tap(f"layers.{number}", torch.relu(layer(h_BD)))
        return h_BD
