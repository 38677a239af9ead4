"""Sequence-to-sequence tuning of a pseudo-masked language model (UniLMv2, Bao et al. 2020, arXiv 2002.12804, section
3.5): what was learnt block after block goes on with blocks of one token, from left to right.

    L = - sum_t log p(y_t | x, y_1, ..., y_{t-1})

The tokens that are no targets (x) have role 0: all see all of them. The t-th target has role t, and a stand-in with
role -t in its place predicts it (`torchstone.model.mask.Roles`). What nothing needs, the last target itself, is no
column. Any data with a next token to predict will do: prompts with responses, of which the responses are targets, or
text, of which every token is one.

Shapes: B rows, T tokens of a row, L targets of a row at most, U = T + L.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.mask import Mask, Roles
from torchstone.objectives import Batch, Facts, Objective, ObjectiveSpec, Result, Term, tokens_of
from torchstone.objectives.causal_lm import vocabulary_loss
from torchstone.objectives.pseudo_masked import PseudoMasked, PseudoMaskedSpec

__all__ = ["PseudoMaskedSeq2seq", "PseudoMaskedSeq2seqSpec"]

_MASK = Mask((Roles(),))
_IGNORE = -100


class PseudoMaskedSeq2seqSpec(ObjectiveSpec):
    """Predict each target after all that is no target and the targets before it, with an encoder of pseudo masks."""

    paper: ClassVar[str] = "Bao et al. 2020, arXiv 2002.12804"

    smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of each target's probability that is spread over the vocabulary in training; never in evaluation."""
    stand_in: int | None = Field(None, ge=0)
    """Id of the token that stands in, as in pre-training; None takes the padding token."""

    def build(self, facts: Facts) -> Objective:
        pretraining = PseudoMaskedSpec(stand_in=self.stand_in).build(facts)
        assert isinstance(pretraining, PseudoMasked)
        return PseudoMaskedSeq2seq(self, pretraining.stand_in)


class PseudoMaskedSeq2seq(Objective):
    """Batch: ids, next (B, T), `next` below zero where there is no target. `prepare` adds `pseudo` (B, U), the
    stand-ins and then the row, `targets` (B, U), -100 where nothing is predicted, and columns `role`, `position`,
    `start` and `valid` for them."""

    def __init__(self, spec: PseudoMaskedSeq2seqSpec, stand_in: int) -> None:
        super().__init__()
        self.spec, self.stand_in = spec, stand_in

    def check(self, model: nn.Module) -> None:
        if getattr(model, "decoder", None) is not None:
            raise TorchstoneError("objective pseudo_masked_seq2seq: needs causal: false; roles say who sees whom")

    def prepare(self, batch: Batch, key: Key) -> Batch:
        ids_BT, next_BT = batch["ids"], batch["next"]
        T, there_BT = ids_BT.shape[1], next_BT >= 0
        valid_BT = batch["valid"] if "valid" in batch else torch.ones_like(there_BT)
        start_BT = batch["start"] if "start" in batch else torch.zeros_like(ids_BT)
        position_BT = torch.arange(T, device=ids_BT.device) - start_BT
        step_BT = there_BT.cumsum(1)  # of the target behind each token
        # a token is a target where the one before it predicts it
        role_BT = F.pad(torch.where(there_BT, step_BT, 0), (1, 0))[:, :T]
        L = max(1, int(there_BT.sum(1).max()))
        at_BL = there_BT.int().argsort(dim=1, descending=True, stable=True)[:, :L]
        there_BL = there_BT.gather(1, at_BL)

        def joined(of_text: torch.Tensor, of_stand_ins: torch.Tensor) -> torch.Tensor:
            return torch.cat([of_stand_ins, of_text], 1)

        columns = {
            "pseudo": joined(ids_BT, torch.full_like(at_BL, self.stand_in)),
            "targets": joined(torch.full_like(ids_BT, _IGNORE), next_BT.gather(1, at_BL)),
            "role": joined(role_BT, torch.where(there_BL, -step_BT.gather(1, at_BL), 0)),
            "position": joined(position_BT, torch.where(there_BL, position_BT.gather(1, at_BL) + 1, 0)),
            "valid": joined(valid_BT, there_BL),
        }
        if "start" in batch:
            # a stand-in belongs to the document that it goes on with, also where the next one begins
            columns["start"] = joined(start_BT, start_BT.gather(1, at_BL))
        return {**batch, **columns}

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"targets": (batch["targets"] >= 0).sum(), "tokens": batch["valid"][:, -batch["ids"].shape[1] :].sum()}

    def forward(self, model: nn.Module, batch: Batch, key: Key | None) -> Result:
        out = model(
            tokens_of(batch, batch["pseudo"]),
            outputs="none",
            mask=_MASK,
            key=None if key is None else key.tensor(batch["ids"].device),
        )
        chosen = batch["targets"] >= 0
        hidden_ND, target_N = out.hidden[chosen], batch["targets"][chosen]
        if key is None or not self.spec.smoothing:
            nll = vocabulary_loss(model, hidden_ND, target_N)
        else:
            product = model.vocabulary_head().product(hidden_ND, model.embedding.table())  # type: ignore[operator, union-attr]
            logits_NV = product.logits()
            nll = F.cross_entropy(logits_NV, target_N, reduction="sum", label_smoothing=self.spec.smoothing)
        return Result.of({"loss": Term(nll)}, out.aux)
