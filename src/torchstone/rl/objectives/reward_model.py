"""A reward model: what people would choose, as one number a text (Ouyang et al. 2022, arXiv 2203.02155, eq. 1), the
preference reward of the last stage of DeepSeek-R1 (DeepSeek-AI 2025, arXiv 2501.12948, section 2.3.4).

    L = -log sigmoid(r(x, y+) - r(x, y-))                        (Bradley and Terry 1952)

r is the model's one logit, of ``head: {kind: classification, classes: 1, pool: last}``: read at the last token of the
response, for rows of preferences leave the separator behind it off. L does not change if a constant is added to all r.
With ``centering`` c, c (r+ + r-)^2 is added, which holds them around zero (Eisenstein et al. 2023, arXiv 2312.09244).

Shapes: B pairs, N of them with a target, T tokens of a row.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import logsigmoid

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.context import Aux
from torchstone.objectives import Batch, Facts, Objective, ObjectiveSpec, Result, Term, tokens_of
from torchstone.ops import at_least_float32

__all__ = ["RewardModel", "RewardModelObjectiveSpec"]


class RewardModelObjectiveSpec(ObjectiveSpec):
    """Score the chosen of two responses higher than the rejected one."""

    paper: ClassVar[str] = "Ouyang et al. 2022, arXiv 2203.02155"
    paired: ClassVar[bool] = True

    centering: float = Field(0.0, ge=0, le=100)
    """Weight of the squared sum of a pair's rewards, which keeps them around zero."""

    def build(self, facts: Facts) -> Objective:
        return RewardModel(self)


class RewardModel(Objective):
    """Batch: ids, next, valid (B, 2, T), the chosen response first. A pair without any target counts nothing."""

    def __init__(self, spec: RewardModelObjectiveSpec) -> None:
        super().__init__()
        self.spec = spec

    def check(self, model: nn.Module) -> None:
        head = getattr(getattr(model, "spec", None), "head", None)
        if getattr(model, "decoder", None) is not None and getattr(head, "pool", None) == "first":
            raise TorchstoneError(
                "objective reward_model: the first token of a causal model sees nothing of the response; set "
                "model.head.pool: last"
            )

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {
            "pairs": (batch["next"] >= 0).flatten(1).any(1).sum(),
            "tokens": batch["valid"].sum() if "valid" in batch else torch.tensor(batch["ids"].numel()),
        }

    def forward(self, model: nn.Module, batch: Batch, key: Key | None) -> Result:
        return self._result(model, batch, key)[0]

    def evaluate(self, model: nn.Module, batch: Batch, predict: bool = False) -> Result:
        result, scores = self._result(model, batch, None)
        return Result({"loss": result.terms["loss"]}, result.metrics, scores=scores)

    def _result(self, model: nn.Module, batch: Batch, key: Key | None) -> tuple[Result, Aux]:
        rows: Batch = {name: value.flatten(0, 1) for name, value in batch.items() if value.dim() == 3}
        out: Any = model(tokens_of(rows), key=None if key is None else key.tensor(rows["ids"].device))
        if out.logits.shape != (len(rows["ids"]), 1):
            raise TorchstoneError(
                f"objective reward_model: needs one logit a text, and the model's are {tuple(out.logits.shape)}; set "
                "model.head: {kind: classification, classes: 1, pool: last}"
            )
        there_B = (batch["next"] >= 0).flatten(1).any(1)
        reward_N2 = at_least_float32(out.logits).view(-1, 2)[there_B]
        margin_N = reward_N2[:, 0] - reward_N2[:, 1]
        terms = {"loss": Term(-logsigmoid(margin_N).sum(), "pairs")}
        if self.spec.centering:
            terms["centering"] = Term(reward_N2.sum(1).square().sum(), "pairs", self.spec.centering)
        means = {
            "accuracy": (margin_N.sign() + 1) / 2,  # ties count half
            "reward_margin": margin_N,
            "reward_chosen": reward_N2[:, 0],
            "reward_rejected": reward_N2[:, 1],
        }
        scores: Aux = {name: (x_N.detach().sum(), there_B.sum()) for name, x_N in means.items()}
        result = Result.of(terms, out.aux)
        return Result(result.terms, {**result.metrics, **scores}), scores
