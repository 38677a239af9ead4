"""Training of a discrete variational autoencoder (Ramesh et al. 2021, arXiv 2102.12092, section 2.1; Bao et al. 2022,
arXiv 2106.08254, section 2.6): a bound on the likelihood of pictures, whose prior over codes is uniform.

    L = mean over pixels (x' - x)^2  +  beta * mean over places KL(q || uniform),   KL = ln K + sum over codes q ln q

The squared error stands for the likelihood of pixels up to a scale, which beta has in it. In evaluation pictures are
made from the likeliest codes.

B pictures, K codes, h codes of a side.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.objectives import Batch, Facts, Objective, ObjectiveSpec, Result, Term
from torchstone.ops import at_least_float32
from torchstone.vision.model.discrete_vae import DiscreteVAE

__all__ = ["DiscreteVAELoss", "DiscreteVAELossSpec"]


class DiscreteVAELossSpec(ObjectiveSpec):
    """Reconstruct pictures from codes that are close to uniform: the training of an image tokenizer."""

    example: ClassVar[str | None] = "images"
    paper: ClassVar[str] = "Ramesh et al. 2021, arXiv 2102.12092"

    beta: float = Field(1e-4, ge=0, le=1e4)
    """Weight of the divergence of a place's codes from uniform, beside the squared error of a pixel."""

    def build(self, facts: Facts) -> Objective:
        return DiscreteVAELoss(self)


class DiscreteVAELoss(Objective):
    """Batch: pixels (B, C, I, I)."""

    def __init__(self, spec: DiscreteVAELossSpec) -> None:
        super().__init__()
        self.spec = spec
        self.stride = 1

    def check(self, model: nn.Module) -> None:
        if not isinstance(model, DiscreteVAE):
            raise TorchstoneError("objective discrete_vae: needs model.kind: discrete_vae")
        self.stride = model.stride

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        pixels = batch["pixels"]
        places = pixels[:, 0].numel() // self.stride**2
        return {"pixels": torch.tensor(pixels.numel()), "tokens": torch.tensor(places)}

    def forward(self, model: nn.Module, batch: Batch, key: Key | None) -> Result:
        pixels = batch["pixels"]
        out: Any = model(pixels, key=None if key is None else key.tensor(pixels.device))
        error = (at_least_float32(out.pixels) - pixels).square().sum()
        log_q_BKhh = at_least_float32(out.logits).log_softmax(1)
        kl_Bhh = math.log(log_q_BKhh.shape[1]) + (log_q_BKhh.exp() * log_q_BKhh).sum(1)
        terms = {"reconstruction": Term(error, "pixels"), "divergence": Term(kl_Bhh.sum(), "tokens", self.spec.beta)}
        return Result(terms, {"squared_error": (error.detach(), torch.tensor(pixels.numel()))})

    def evaluate(self, model: nn.Module, batch: Batch, predict: bool = False) -> Result:
        found = self(model, batch, None)
        return Result(found.terms, scores=found.metrics)
