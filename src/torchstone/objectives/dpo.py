"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), the preference training of DeepSeek
LLM (Bi et al. 2024, arXiv 2401.02954, section 5): of two responses to a prompt, make the chosen one likelier than the
rejected one, measured against a frozen reference.

    reward(y) = beta * log (pi(y | x) / pi_ref(y | x))        L = -log sigmoid(reward(y+) - reward(y-))

Log-probabilities are sums over the response's tokens, the separator that ends it included. With label smoothing e the
loss is (1 - e) L plus e times L of the pair the other way round (Mitchell 2023, "conservative DPO").

Chosen and rejected rows go through the model together. All logits never exist: a first pass of the head gives the
log-probabilities, which decide each pair's part in the gradient, a second one its sum of weighted log-probabilities.

Shapes: B pairs, T tokens of a row, D width, N tokens of all responses.
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
from torchstone.model.tokens import Tokens
from torchstone.objectives import Batch, Facts, Objective, ObjectiveSpec, Result, Term, tokens_of
from torchstone.objectives._frozen import WithReference, reference_of
from torchstone.ops.cross_entropy import linear_cross_entropy, linear_nll

__all__ = ["DPO", "DPOSpec"]


class DPOSpec(ObjectiveSpec):
    """Prefer the chosen of two responses to the rejected one, beside a frozen reference."""

    paper: ClassVar[str] = "Rafailov et al. 2023, arXiv 2305.18290"
    paired: ClassVar[bool] = True

    beta: float = Field(0.1, gt=0, le=100)
    """How much a log-ratio to the reference counts; the larger, the less the model leaves the reference."""
    reference: str | None = Field(None, min_length=1)
    """Directory of the run that is the reference; without it that of `init_from`."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs that are taken to be labelled the wrong way round."""

    def build(self, facts: Facts) -> Objective:
        run = self.reference or facts.init_from
        return DPO(self, reference_of("dpo", "reference", run, facts), run or "")


class DPO(WithReference):
    """Batch: ids, next, valid (B, 2, T), the chosen response first; `next` below zero outside of responses. A pair
    without any target counts nothing.

    Args:
        spec: beta and label smoothing.
        reference: a causal language model.
        name: of the reference, for messages.
    """

    def __init__(self, spec: DPOSpec, reference: nn.Module, name: str = "reference") -> None:
        super().__init__("dpo", reference, name)
        self.spec = spec

    def check(self, model: nn.Module) -> None:
        for who, each in (("model", model), ("reference", self.reference)):
            if getattr(each, "decoder", self) is None:
                raise TorchstoneError(f"objective dpo: needs causal: true; the {who} is an encoder")
        super().check(model)

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        targets_B2T = batch["next"] >= 0
        return {
            "pairs": targets_B2T.flatten(1).any(1).sum(),
            "targets": targets_B2T.sum(),
            "tokens": batch["valid"].sum() if "valid" in batch else torch.tensor(batch["ids"].numel()),
        }

    def forward(self, model: nn.Module, batch: Batch, key: Key | None) -> Result:
        return self._result(model, batch, key)[0]

    def evaluate(self, model: nn.Module, batch: Batch, predict: bool = False) -> Result:
        result, scores = self._result(model, batch, None)
        return Result(result.terms, result.metrics, scores=scores)

    def _result(self, model: Any, batch: Batch, key: Key | None) -> tuple[Result, Aux]:
        rows: Batch = {name: value.flatten(0, 1) for name, value in batch.items() if value.dim() == 3}
        tokens, next_RT = tokens_of(rows), rows["next"]
        where_RT = next_RT >= 0
        out = model(tokens, outputs="none", key=None if key is None else key.tensor(next_RT.device))
        head = model.vocabulary_head().product(out.hidden[where_RT], model.embedding.table())
        own_B2 = _sums(head, next_RT, where_RT)
        reference_B2 = self._reference(tokens, next_RT, where_RT)
        beta, e = self.spec.beta, self.spec.label_smoothing
        log_ratio_B2 = own_B2 - reference_B2
        margin_B = beta * (log_ratio_B2[:, 0] - log_ratio_B2[:, 1])
        there_B = where_RT.view(len(margin_B), -1).any(1)
        loss_B = -(1 - e) * logsigmoid(margin_B) - e * logsigmoid(-margin_B)
        loss = torch.where(there_B, loss_B, 0.0).sum()
        if torch.is_grad_enabled():
            # dL / d log pi(y+) = -dL / d log pi(y-) = -beta (sigmoid(-margin) - e): numbers by now, so that the loss's
            # gradient is that of a weighted sum of log-probabilities, which is added with the value zero
            by_B = torch.where(there_B, beta * (torch.sigmoid(-margin_B) - e), 0.0)
            by_RT = torch.stack([by_B, -by_B], 1).view(-1, 1).expand_as(next_RT)
            surrogate = linear_cross_entropy(
                head.h, head.weight, next_RT[where_RT], by_RT[where_RT], bias_V=head.bias, softcap=head.softcap
            )
            loss = loss + (surrogate - surrogate.detach())
        scores = self._scores(log_ratio_B2, reference_B2, margin_B, there_B, where_RT)
        result = Result.of({"loss": Term(loss, "pairs")}, out.aux)
        return Result(result.terms, {**result.metrics, **scores}), scores

    @torch.no_grad()
    def _reference(self, tokens: Tokens, next_RT: torch.Tensor, where_RT: torch.Tensor) -> torch.Tensor:
        model: Any = self.reference
        hidden_RTD = model(tokens, outputs="none").hidden
        return _sums(model.vocabulary_head().product(hidden_RTD[where_RT], model.embedding.table()), next_RT, where_RT)

    def _scores(
        self,
        log_ratio_B2: torch.Tensor,
        reference_B2: torch.Tensor,
        margin_B: torch.Tensor,
        there_B: torch.Tensor,
        where_RT: torch.Tensor,
    ) -> Aux:
        """Means over pairs, but `log_ratio`, which is over tokens. Ties of `accuracy` count half."""
        pairs = there_B.sum()

        def mean(x_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.where(there_B, x_B, 0.0).sum(), pairs

        return {
            "accuracy": mean(_wins(margin_B)),
            "reference_accuracy": mean(_wins(reference_B2[:, 0] - reference_B2[:, 1])),
            "reward_margin": mean(margin_B),
            "reward_chosen": mean(self.spec.beta * log_ratio_B2[:, 0]),
            "reward_rejected": mean(self.spec.beta * log_ratio_B2[:, 1]),
            "log_ratio": (log_ratio_B2.sum(), where_RT.sum()),
        }


def _wins(x: torch.Tensor) -> torch.Tensor:
    return (x > 0).to(x.dtype) + 0.5 * (x == 0).to(x.dtype)


@torch.no_grad()
def _sums(head: Any, next_RT: torch.Tensor, where_RT: torch.Tensor) -> torch.Tensor:
    """Log-probability of each response, (B, 2), from the head's product at the responses' positions, without a
    gradient."""
    nll_N = linear_nll(head.h, head.weight, next_RT[where_RT], bias_V=head.bias, softcap=head.softcap)
    nll_RT = torch.zeros_like(next_RT, dtype=nll_N.dtype).masked_scatter(where_RT, nll_N)
    return -nll_RT.sum(1).view(-1, 2)
