"""Multi-token prediction (DeepSeek-AI 2024, arXiv 2412.19437, section 2.2, eqs. 24 and 25): the next token, and by the
modules of `stack.multi_token` those after it.

    L = L_main + weight / D * sum over k = 1 .. D of L^k        L^k = - 1 / T * sum over i of log p^k_i(t_{i+k+1})

The sum is over the positions i whose token t_{i+k} is of the same document; as for the main model, the last target of a
document is the separator after it. As in the paper, all losses are divided by the number of the main model's targets.

Shapes: B rows, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.context import add_aux
from torchstone.model.stack.multi_token import predict, predictors_of
from torchstone.objectives import Batch, Facts, Objective, ObjectiveSpec, Result, Term, tokens_of
from torchstone.objectives.causal_lm import CausalLM, vocabulary_loss

__all__ = ["MultiToken", "MultiTokenSpec", "further_targets"]


class MultiTokenSpec(ObjectiveSpec):
    """Predict the next token, and by the modules of stack multi_token further ones."""

    paper: ClassVar[str] = "DeepSeek-AI 2024, arXiv 2412.19437"

    weight: float = Field(0.3, ge=0, le=100)
    """Of the mean of the modules' losses, beside 1 for the main model's."""

    def build(self, facts: Facts) -> Objective:
        return MultiToken(self)


class MultiToken(CausalLM):
    """Batch: as of `causal_lm`. Evaluation measures the main model alone, and so compares with `causal_lm`."""

    def __init__(self, spec: MultiTokenSpec) -> None:
        super().__init__()
        self.weight = spec.weight

    def check(self, model: nn.Module) -> None:
        super().check(model)
        if predictors_of(model) is None:
            raise TorchstoneError("objective multi_token: needs the modules of model.stack: {kind: multi_token}")

    def forward(self, model: Any, batch: Batch, key: Key | None) -> Result:
        tokens, drop = tokens_of(batch), None if key is None else key.tensor(batch["ids"].device)
        out = model(tokens, outputs="none", key=drop)
        terms, aux, hidden_BTD = {"loss": Term(vocabulary_loss(model, out.hidden, batch["next"]))}, out.aux, out.hidden
        depth, length = len(predictors_of(model) or ()), batch["ids"].shape[1]
        for k in range(1, min(depth, length - 1) + 1):
            here = replace(tokens.slice(0, length - k), ids=batch["ids"][:, k:])
            hidden_BTD, more = predict(model, k, hidden_BTD[:, : length - k], here, key=drop)
            nll = vocabulary_loss(model, hidden_BTD, further_targets(batch, k))
            terms[f"mtp_{k}"] = Term(nll, weight=self.weight / depth)
            aux = add_aux(aux, more)
        return Result.of(terms, aux)


def further_targets(batch: Batch, k: int) -> torch.Tensor:
    """t_{i+k+1} for i = 0 .. T - 1 - k, (B, T - k); -100 where t_{i+k} is of another document, or padding, or has no
    target itself."""
    targets = batch["next"][:, k:]
    if "start" in batch:
        targets = torch.where(batch["start"][:, k:] == batch["start"][:, :-k], targets, -100)
    if "valid" in batch:
        targets = torch.where(batch["valid"][:, k:] & batch["valid"][:, :-k], targets, -100)
    return targets
