"""A head that gives one set of logits a sequence: pool, optionally transform (BERT's pooler), project.

Published heads differ in the activation of the transform: tanh in BERT and RoBERTa, gelu in ELECTRA. Encoders of
pictures take the mean over patches and a norm (BEiT).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from torchstone.model.feedforward import ACTIVATIONS, Activation
from torchstone.model.head import Head, HeadSpec
from torchstone.model.linear import Linear
from torchstone.model.site import Initialise, Site
from torchstone.model.tokens import Tokens
from torchstone.spec import resolve

__all__ = ["ClassificationHead", "ClassificationSpec"]


class ClassificationSpec(HeadSpec):
    """One set of logits a sequence, from its first, last or mean hidden state."""

    classes: int = Field(2, ge=1)
    """Number of classes; 1 is a regression."""
    pool: Literal["first", "last", "mean", "patches"] = "first"
    """Which hidden state: the first token's, the last valid token's, the mean over valid tokens, or over those but the
    first, which is a picture's class token."""
    norm: bool = False
    """A norm of the pooled state, of the model's kind."""
    pooler: bool = False
    """A dense layer and an activation before the projection (BERT)."""
    activation: Literal["tanh"] | Activation = "tanh"
    """Activation of the pooler."""
    scale: float = Field(1.0, gt=0, le=1)
    """Factor on the first values of the projection; 0.001 in BEiT."""

    def build(self, site: Site, vocabulary: int | None) -> Head:
        return ClassificationHead(self, site)


def _scaled(init: Initialise, scale: float) -> Initialise:
    def rule(weight: torch.Tensor, role: str, generator: torch.Generator) -> None:
        init(weight, role, generator)
        weight.mul_(scale)

    return rule


class ClassificationHead(Head):
    """(B, T, D) -> (B, classes)."""

    def __init__(self, spec: ClassificationSpec, site: Site) -> None:
        super().__init__()
        self.pool = spec.pool
        self.norm = site.norm() if spec.norm else None
        self.activation = torch.tanh if spec.activation == "tanh" else ACTIVATIONS[spec.activation]
        dense = resolve("linear", "dense")()
        self.pooler = Linear(site.width, (site.width,), ("up",), True, dense, site.init) if spec.pooler else None  # type: ignore[arg-type]
        self.out = Linear(site.width, (spec.classes,), ("head",), True, dense, _scaled(site.init, spec.scale))  # type: ignore[arg-type]

    def forward(self, h_BTD: torch.Tensor, tokens: Tokens, table_VE: torch.Tensor | None) -> torch.Tensor:
        B, T, _ = h_BTD.shape
        valid = torch.ones(1, T, dtype=torch.bool, device=h_BTD.device) if tokens.valid is None else tokens.valid
        valid = valid.expand(B, T)
        if self.pool in ("mean", "patches"):
            if self.pool == "patches":
                valid = valid & (valid.cumsum(1) > 1)  # all but the class token, which comes first
            weights = valid.to(h_BTD.dtype)[..., None]
            h_BD = (torch.where(valid[..., None], h_BTD, 0) * weights).sum(1) / weights.sum(1).clamp(min=1)
        else:
            order = torch.arange(T, device=h_BTD.device)
            at = torch.where(valid, order, T).amin(1) if self.pool == "first" else torch.where(valid, order, 0).amax(1)
            h_BD = h_BTD[torch.arange(B, device=h_BTD.device), at.clamp(max=T - 1)]
        if self.norm is not None:
            h_BD = self.norm(h_BD)
        if self.pooler is not None:
            h_BD = self.activation(self.pooler(h_BD))
        return self.out(h_BD)
