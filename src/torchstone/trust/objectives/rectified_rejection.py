"""Rectified rejection (Pang et al. 2022, arXiv 2105.14785): adversarial training that also learns how far the
confidence of a prediction may be trusted.

f(x) is the softmax, Con(x) its largest value, T-Con(x) its value at the true class, A(x) in (0, 1) the auxiliary head.
R-Con(x) = A(x) Con(x) is trained to be T-Con(x), on the images that the host attacks through the classifier alone:

    L = L_host + weight * BCE(Con(x') A(x'), T-Con(x'))

T-Con is a fixed target. Where the prediction is right Con is fixed too, so that the term trains A and does not push
confidence up. The best A at fixed Con and T-Con is T-Con / Con, which is 1 where the prediction is right.

B examples, C classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from torchstone.data.blocks import IGNORE
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.context import Aux
from torchstone.objectives import Batch, Facts, Objective, Result, Term
from torchstone.ops import at_least_float32
from torchstone.trust.model._classifier import Classified
from torchstone.trust.objectives.adversarial import Adversarial, AdversarialSpec

__all__ = ["RectifiedRejection", "RectifiedRejectionSpec"]

_CLAMP = 1e-6
"""R-Con is kept this far from 0 and 1, where its cross-entropy has no bound."""


class RectifiedRejectionSpec(AdversarialSpec):
    """Adversarial training of a classifier and of a head that says when to reject what it predicts (R-Con)."""

    paper: ClassVar[str] = "Pang et al. 2022, arXiv 2105.14785"

    weight: float = Field(1.0, ge=0, le=1e4)
    """Weight of the auxiliary head's term (lambda)."""

    def build(self, facts: Facts) -> Objective:
        return RectifiedRejection(self, facts.classes)


class RectifiedRejection(Adversarial):
    """Batches as those of `Adversarial`."""

    spec: RectifiedRejectionSpec

    def check(self, model: nn.Module) -> None:
        super().check(model)
        if getattr(model, "rejection", None) is None:
            raise TorchstoneError("objective rectified_rejection: the model has no auxiliary head; set model.rejection")

    def target(self, probs_BC: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
        """What R-Con is trained to be: T-Con, (B,)."""
        return probs_BC.gather(1, label_B[:, None])[:, 0]

    def rejection(self, out: Classified, label_B: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy of R-Con against T-Con in nats, (B,)."""
        assert out.auxiliary is not None
        probs_BC = at_least_float32(out.logits).softmax(1)
        con_B, predicted_B = probs_BC.max(1)
        target_B = self.target(probs_BC, label_B).detach()
        con_B = torch.where(predicted_B == label_B, con_B.detach(), con_B)
        rcon_B = (con_B * at_least_float32(out.auxiliary)).clamp(_CLAMP, 1 - _CLAMP)
        return -(target_B * rcon_B.log() + (1 - target_B) * (-rcon_B).log1p())

    def scores(self, model: nn.Module, batch: Batch, out: Classified) -> Aux:
        """Also the share of attacked images that the coupled rule at xi = 0 accepts, Con > 1/2 and R-Con > 1/2, and
        the accuracy among those."""
        assert out.auxiliary is not None
        con_B, predicted_B = out.logits.softmax(1).max(1)
        known_B = batch["label"] != IGNORE
        accepted_B = (con_B > 0.5) & (con_B * out.auxiliary > 0.5) & known_B
        right_B = accepted_B & (predicted_B == batch["label"])
        more = {
            "accepted": (accepted_B.sum(), known_B.sum()),
            "accepted_accuracy": (right_B.sum(), accepted_B.sum()),
        }
        return {**super().scores(model, batch, out), **more}

    def _result(self, model: nn.Module, batch: Batch, key: Key | None) -> tuple[Result, Classified]:
        result, out = super()._result(model, batch, key)
        known_B = batch["label"] != IGNORE
        each_B = self.rejection(out, batch["label"].clamp(min=0))
        term = Term(torch.where(known_B, each_B, 0.0).sum(), "examples", self.spec.weight)
        return replace(result, terms={**result.terms, "rejection": term}), out
