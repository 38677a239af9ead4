"""Frequency-agnostic embeddings (FRAGE, Gong et al. 2018, arXiv 1809.06858): beside any loss over tokens, a
discriminator learns to tell the embeddings of popular words from those of rare ones, and the embeddings to fool it.

    min over embeddings and model, max over the discriminator:    L_task - weight * L_D
    L_D = 1/2 * mean over popular w of -log p(popular | e_w)  +  1/2 * mean over rare w of -log p(rare | e_w)

`popular` token ids are popular, by their counts in the training split; special tokens belong to neither side.

Once a step, before its first micro-batch, the discriminator takes `inner_steps` of plain gradient descent on L_D over
the whole table as it is then (`Objective.before_step`). Its weights are no parameters of the training: no optimiser,
clipping or moving average sees them, so that weight 0 is the task's own training to the bit; they are saved with the
objective. With `rare_only` the loss of the embeddings is -weight times the mean over rare words alone, and popular
words stay where the task puts them. As L_D does not depend on the batch, it is counted once a micro-batch.

`match: moments` has no discriminator: weight times the sum of the Euclidean distances between mean, variance, skewness
and kurtosis of both sides, each by dimension, is added.

Shapes: V tokens, E width of the table.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn
from torch.func import functional_call

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.context import Aux
from torchstone.objectives import Batch, Facts, Objective, ObjectiveSpec, Result, Term
from torchstone.spec import Part, part

__all__ = ["FrequencyAdversary", "FrequencyAdversarySpec", "balanced_loss", "moment_distance", "sides_of"]

_POPULAR, _RARE, _NEITHER = 0, 1, -1
_UNIFORM = 0.1
"""Largest first weight of the discriminator."""


class FrequencyAdversarySpec(ObjectiveSpec):
    """Another objective, and embeddings that do not tell how often their words are used."""

    paper: ClassVar[str] = "Gong et al. 2018, arXiv 1809.06858"

    task: Part[ObjectiveSpec] = part("causal_lm", "objective")
    """The objective beside which it stands."""
    popular: int = Field(1000, ge=1)
    """How many of the most frequent tokens of the training split count as popular; all others are rare."""
    match: Literal["discriminator", "moments"] = "discriminator"
    """What compares both sides: a discriminator that learns, or the first four moments."""
    weight: float = Field(0.02, ge=0, le=100)
    """Of the comparison, beside the task's loss; 0 leaves the training alone, and the discriminator a mere probe."""
    rare_only: bool = True
    """Whether only embeddings of rare tokens are moved by it."""
    hidden: int = Field(0, ge=0, le=65536)
    """Units of a hidden layer (ReLU) of the discriminator; 0 makes it linear."""
    disc_lr: float = Field(0.02, gt=0, le=100)
    """Learning rate of the discriminator's gradient descent."""
    disc_decay: float = Field(1.2e-6, ge=0, lt=1)
    """Weight decay of the discriminator."""
    inner_steps: int = Field(1, ge=1, le=1000)
    """Steps of the discriminator before each step of the training."""

    @model_validator(mode="after")
    def _one_row(self) -> FrequencyAdversarySpec:
        if self.task.paired or self.task.example not in ("tokens", None) or isinstance(self.task, type(self)):
            raise ValueError(f"task {self.task.kind} cannot stand beside it; it takes an objective over single texts")
        return self

    def build(self, facts: Facts) -> Objective:
        if facts.frequencies is None:
            raise TorchstoneError("objective frequency_adversary: needs the counts of tokens in the training split")
        embedding = getattr(facts.model, "embedding", None)
        if embedding is None or not embedding.of_tokens:
            raise TorchstoneError("objective frequency_adversary: needs a model with an embedding of tokens")
        special = [id for id in (facts.mask, facts.pad, facts.separator) if id is not None]
        sides_V = sides_of(facts.frequencies(), self.popular, special, facts.vocabulary)
        return FrequencyAdversary(self, self.task.build(facts), sides_V, embedding.table_width(facts.model.width))


class FrequencyAdversary(Objective):
    """Batch: as of the task. Evaluation measures the task alone, and so compares with it; it scores
    ``discriminator_accuracy``, the mean of both sides' shares that are told rightly, or ``moment_distance``."""

    sides_V: torch.Tensor

    def __init__(self, spec: FrequencyAdversarySpec, task: Objective, sides_V: torch.Tensor, width: int) -> None:
        super().__init__()
        self.spec, self.task = spec, task
        self.couples, self.codes, self.reference = task.couples, task.codes, task.reference  # type: ignore[misc]
        self.register_buffer("sides_V", sides_V, persistent=False)
        self.judge: nn.Sequential | None = None
        if spec.match == "discriminator":
            sizes = [width, *([spec.hidden] if spec.hidden else []), 2]
            layers: list[nn.Module] = []
            for fan_in, fan_out in itertools.pairwise(sizes):
                layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
            self.judge = nn.Sequential(*layers[:-1])
            for name, value in self.judge.named_parameters():
                nn.init.zeros_(value) if name.endswith("bias") else nn.init.uniform_(value, -_UNIFORM, _UNIFORM)
            self.judge.requires_grad_(False)

    def check(self, model: nn.Module) -> None:
        self.task.check(model)
        if len(self.table(model)) != len(self.sides_V):
            raise TorchstoneError("objective frequency_adversary: the model's table has rows for other tokens")

    def prepare(self, batch: Batch, key: Key) -> Batch:
        return self.task.prepare(batch, key)

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {**self.task.counts(batch), "tables": torch.tensor(1)}

    def before_step(self, model: nn.Module, step: int) -> None:
        self.task.before_step(model, step)
        if self.judge is None:
            return
        table_VE = self.table(model).detach()
        for _ in range(self.spec.inner_steps):
            weights = {name: value.detach().requires_grad_() for name, value in self.judge.named_parameters()}
            loss = balanced_loss(functional_call(self.judge, weights, table_VE), self.sides_V)
            slopes = torch.autograd.grad(loss, list(weights.values()))
            for value, slope in zip(self.judge.parameters(), slopes, strict=True):
                value.sub_(self.spec.disc_lr * (slope + self.spec.disc_decay * value))

    def forward(self, model: nn.Module, batch: Batch, key: Key | None) -> Result:
        result = self.task(model, batch, key)
        term, scores = self.compare(model)
        terms = {**result.terms, "frequency": term} if term.weight else result.terms
        return replace(result, terms=terms, metrics={**result.metrics, **scores})

    def evaluate(self, model: nn.Module, batch: Batch, predict: bool = False) -> Result:
        result = self.task.evaluate(model, batch, predict)
        return replace(result, scores={**result.scores, **self.compare(model)[1]})

    def compare(self, model: nn.Module) -> tuple[Term, Aux]:
        """The term of the embeddings, and what is reported of them."""
        popular_V, rare_V = self.sides_V == _POPULAR, self.sides_V == _RARE
        with torch.autocast(self.sides_V.device.type, enabled=False):
            table_VE = self.table(model)
            if self.spec.rare_only:
                table_VE = torch.where(rare_V[:, None], table_VE, table_VE.detach())
            if self.judge is None:
                total = moment_distance(table_VE[popular_V], table_VE[rare_V])
                name, value, weight = "moment_distance", total.detach(), self.spec.weight
            else:
                logits_V2 = self.judge(table_VE)
                total = (
                    _loss(logits_V2, rare_V, _RARE) if self.spec.rare_only else balanced_loss(logits_V2, self.sides_V)
                )
                name, value, weight = "discriminator_accuracy", _accuracy(logits_V2, self.sides_V), -self.spec.weight
        return Term(total, "tables", weight), {name: (value, torch.ones_like(value))}

    def table(self, model: Any) -> torch.Tensor:
        """The embeddings that are compared, (V, E)."""
        return model.embedding.table()


def sides_of(count_V: torch.Tensor, popular: int, special: list[int], vocabulary: int | None = None) -> torch.Tensor:
    """Which side each token is on, int64 (V,): 0 popular, 1 rare, -1 neither.

    Args:
        count_V: how often each is used; among equals, lower ids count as more frequent.
        popular: how many are popular.
        special: tokens on neither side, and beside them all from `vocabulary` on, which no text holds.

    Raises:
        TorchstoneError: no rare token is left.
    """
    side_V = torch.full_like(count_V, _RARE, dtype=torch.int64)
    side_V[special] = _NEITHER
    if vocabulary is not None:
        side_V[vocabulary:] = _NEITHER
    words = int((side_V == _RARE).sum())
    if popular >= words:
        raise TorchstoneError(f"popular is {popular:,}, which leaves none of {words:,} tokens rare")
    order_V = count_V.masked_fill(side_V == _NEITHER, -1).argsort(descending=True, stable=True)
    side_V[order_V[:popular]] = _POPULAR
    return side_V


def balanced_loss(logits_V2: torch.Tensor, side_V: torch.Tensor) -> torch.Tensor:
    """L_D: both sides count the same, however many they are. This is the cross-entropy with the class weights
    |rare| / V for popular and |popular| / V for rare words."""
    return 0.5 * (_loss(logits_V2, side_V == _POPULAR, _POPULAR) + _loss(logits_V2, side_V == _RARE, _RARE))


def moment_distance(a_NE: torch.Tensor, b_ME: torch.Tensor) -> torch.Tensor:
    """Sum of the Euclidean distances between mean, variance, skewness and kurtosis of two sets, each by dimension."""
    return torch.stack([(p - q).norm() for p, q in zip(_moments(a_NE), _moments(b_ME), strict=True)]).sum()


def _moments(x_NE: torch.Tensor) -> list[torch.Tensor]:
    mean_E = x_NE.mean(0)
    off_NE = x_NE - mean_E
    var_E = off_NE.square().mean(0)
    unit_NE = off_NE / var_E.clamp(min=torch.finfo(var_E.dtype).tiny).sqrt()
    return [mean_E, var_E, unit_NE.pow(3).mean(0), unit_NE.pow(4).mean(0)]


def _loss(logits_V2: torch.Tensor, where_V: torch.Tensor, side: int) -> torch.Tensor:
    return -F.log_softmax(logits_V2[where_V], -1)[:, side].mean()


def _accuracy(logits_V2: torch.Tensor, side_V: torch.Tensor) -> torch.Tensor:
    right_V = logits_V2.argmax(-1) == side_V
    return torch.stack([right_V[side_V == side].float().mean() for side in (_POPULAR, _RARE)]).mean()
