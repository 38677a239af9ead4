"""Masked language modelling (Devlin et al. 2018, arXiv 1810.04805, section 3.1): predict tokens that were hidden.

Of the chosen tokens most become the mask token, some a random token, the rest stay; the loss is over the chosen ones.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.mask import BIDIRECTIONAL
from torchstone.objectives import Batch, Facts, Objective, ObjectiveSpec, Result, Term, tokens_of
from torchstone.ops.cross_entropy import linear_cross_entropy

__all__ = ["MaskedLM", "MaskedLMSpec"]


class MaskedLMSpec(ObjectiveSpec):
    """Predict hidden tokens from both sides."""

    paper: ClassVar[str] = "Devlin et al. 2018, arXiv 1810.04805"

    rate: float = Field(0.15, gt=0, lt=1)
    """Share of tokens chosen."""
    masked: float = Field(0.8, ge=0, le=1)
    """Share of the chosen that become the mask token."""
    random: float = Field(0.1, ge=0, le=1)
    """Share of the chosen that become a random token; the rest stay as they are."""

    @model_validator(mode="after")
    def _shares(self) -> MaskedLMSpec:
        if self.masked + self.random > 1:
            raise ValueError(f"masked + random is {self.masked + self.random:g}, more than 1")
        return self

    def build(self, facts: Facts) -> Objective:
        if facts.mask is None or facts.vocabulary is None:
            raise TorchstoneError("objective masked_lm: the tokenizer has no mask token")
        return MaskedLM(self, facts)


class MaskedLM(Objective):
    """Batch: ids (B, T). `prepare` adds `masked` (B, T), the corrupted ids, and `targets` (B, T), -100 elsewhere."""

    def __init__(self, spec: MaskedLMSpec, facts: Facts) -> None:
        super().__init__()
        self.spec, self.facts = spec, facts

    def prepare(self, batch: Batch, key: Key) -> Batch:
        ids, generator = batch["ids"], key.fold("mask").generator()
        drawn = torch.rand(2, *ids.shape, generator=generator).to(ids.device)
        random = torch.randint(self.facts.vocabulary or 1, ids.shape, generator=generator).to(ids.device)
        special = torch.zeros_like(ids, dtype=torch.bool)
        for token in (self.facts.separator, self.facts.pad, self.facts.mask):
            if token is not None:
                special |= ids == token
        if "valid" in batch:
            special |= ~batch["valid"]
        chosen = (drawn[0] < self.spec.rate) & ~special
        how = drawn[1]
        masked = torch.where(chosen & (how < self.spec.masked), self.facts.mask or 0, ids)
        masked = torch.where(chosen & (how >= 1 - self.spec.random), random, masked)
        return {**batch, "masked": masked, "targets": torch.where(chosen, ids, -100)}

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        valid = batch["valid"].sum() if "valid" in batch else torch.tensor(batch["ids"].numel())
        return {"targets": (batch["targets"] >= 0).sum(), "tokens": valid}

    def forward(self, model: nn.Module, batch: Batch, key: Key | None) -> Result:
        out = model(
            tokens_of(batch, batch["masked"]),
            outputs="none",
            mask=BIDIRECTIONAL,
            key=None if key is None else key.tensor(batch["ids"].device),
        )
        chosen = batch["targets"] >= 0
        # only chosen positions reach the head: its transform and its product cost as much as a layer
        product = model.vocabulary_head().product(out.hidden[chosen], model.embedding.table())  # type: ignore[operator, union-attr]
        nll = linear_cross_entropy(
            product.h, product.weight, batch["targets"][chosen], bias_V=product.bias, softcap=product.softcap
        )
        return Result.of({"loss": Term(nll)}, out.aux)
