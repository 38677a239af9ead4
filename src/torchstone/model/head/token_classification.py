"""A head that gives one set of logits a token: tagging, or ELECTRA's detection of replaced tokens (Clark et al. 2020,
arXiv 2003.10555, and its published code).

logits = out(act(dense(h))), or out(h) without the transform. A single class is a binary decision: its probability is
the sigmoid of the logit.
"""

from __future__ import annotations

import torch
from pydantic import Field

from torchstone.model.feedforward import ACTIVATIONS, Activation
from torchstone.model.head import Head, HeadSpec
from torchstone.model.linear import Linear
from torchstone.model.site import Site
from torchstone.model.tokens import Tokens
from torchstone.spec import resolve

__all__ = ["TokenClassificationHead", "TokenClassificationSpec"]


class TokenClassificationSpec(HeadSpec):
    """One set of logits a token, from its hidden state."""

    classes: int = Field(2, ge=1)
    """Number of classes; 1 is a binary decision (ELECTRA)."""
    transform: bool = False
    """A dense layer and an activation before the projection (ELECTRA)."""
    activation: Activation = "gelu"
    """Activation of the transform."""

    def build(self, site: Site, vocabulary: int | None) -> Head:
        return TokenClassificationHead(self, site)


class TokenClassificationHead(Head):
    """(B, T, D) -> (B, T, classes)."""

    def __init__(self, spec: TokenClassificationSpec, site: Site) -> None:
        super().__init__()
        dense = resolve("linear", "dense")()
        self.activation = ACTIVATIONS[spec.activation]
        self.transform = Linear(site.width, (site.width,), ("up",), True, dense, site.init) if spec.transform else None  # type: ignore[arg-type]
        self.out = Linear(site.width, (spec.classes,), ("head",), True, dense, site.init)  # type: ignore[arg-type]

    def forward(self, h_BTD: torch.Tensor, tokens: Tokens, table_VE: torch.Tensor | None) -> torch.Tensor:
        return self.out(h_BTD if self.transform is None else self.activation(self.transform(h_BTD)))
