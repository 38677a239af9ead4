"""Causal language modelling: the cross-entropy of each next token, in nats, by a chunked product with the head."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.head import Product
from torchstone.objectives import Batch, Facts, Objective, ObjectiveSpec, Result, Term, tokens_of
from torchstone.ops.cross_entropy import linear_cross_entropy, linear_nll

__all__ = ["CausalLM", "CausalLMSpec"]

_LOGITS = 1 << 23
"""Logits that exist at once while the likeliest tokens are looked for."""


class CausalLMSpec(ObjectiveSpec):
    """Predict the next token."""

    def build(self, facts: Facts) -> Objective:
        return CausalLM()


class CausalLM(Objective):
    """Batch: ids, next (B, T), `next` below zero where there is no target."""

    codes: ClassVar[bool] = True

    def check(self, model: nn.Module) -> None:
        if getattr(model, "decoder", self) is None:
            raise TorchstoneError("objective causal_lm: needs model.causal: true; an encoder sees the token to predict")

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        valid = batch["valid"].sum() if "valid" in batch else torch.tensor(batch["ids"].numel())
        return {"targets": (batch["next"] >= 0).sum(), "tokens": valid}

    def forward(self, model: nn.Module, batch: Batch, key: Key | None) -> Result:
        out = model(tokens_of(batch), outputs="none", key=None if key is None else key.tensor(batch["ids"].device))
        nll = vocabulary_loss(model, out.hidden, batch["next"])
        return Result.of({"loss": Term(nll)}, out.aux)

    def evaluate(self, model: nn.Module, batch: Batch, predict: bool = False) -> Result:
        out = model(tokens_of(batch), outputs="none")
        product = model.vocabulary_head().product(out.hidden, model.embedding.table())  # type: ignore[operator, union-attr]
        nll_BT = linear_nll(
            product.h.flatten(0, -2),
            product.weight,
            batch["next"].flatten(),
            bias_V=product.bias,
            softcap=product.softcap,
        ).view(batch["next"].shape)
        result = Result.of({"loss": Term(nll_BT.sum())}, out.aux)
        predicted_BT = likeliest(product, batch["next"] >= 0) if predict else None
        return replace(result, nll_BT=nll_BT, predicted_BT=predicted_BT)


def vocabulary_loss(model: nn.Module, hidden_BTD: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Sum of the targets' negative log-likelihoods (targets below zero count nothing), without holding all logits."""
    product = model.vocabulary_head().product(hidden_BTD, model.embedding.table())  # type: ignore[operator, union-attr]
    return linear_cross_entropy(
        product.h.flatten(0, -2), product.weight, targets_BT.flatten(), bias_V=product.bias, softcap=product.softcap
    )


def likeliest(product: Product, where_BT: torch.Tensor) -> torch.Tensor:
    """The likeliest token at some positions, int64 (B, T), -1 at the others, without holding all logits."""
    h_ND = product.h[where_BT]
    rows = max(1, _LOGITS // product.weight.shape[0])
    best_N = torch.cat([replace(product, h=part_ND).logits().argmax(-1) for part_ND in h_ND.split(rows)])
    return torch.full_like(where_BT, -1, dtype=torch.int64).masked_scatter(where_BT, best_N)
