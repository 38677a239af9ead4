"""Objectives: from (model, batch) to loss terms. The engine divides, weights, adds and differentiates.

    batch = objective.prepare(batch, key)          # corruption, masking: no model needed
    batch = objective.collect(model, batch, key)   # what the present model adds: samples
    counts = objective.counts(batch)               # denominators, known before the first backward
    result = objective(model, batch, key)          # terms: sums over what `counts` counts

Because a term is a sum and its count is known for all micro-batches and ranks beforehand, one batch, k unequal
micro-batches and two ranks give the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from torchstone.keys import Key
from torchstone.model.context import Aux
from torchstone.model.tokens import Tokens
from torchstone.spec import PartSpec, lazy_parts

__all__ = ["Batch", "Facts", "Objective", "ObjectiveSpec", "Result", "Term", "tokens_of"]

__getattr__ = lazy_parts(__name__)

Batch = dict[str, torch.Tensor]
"""Tensors by name: ids, next, start, valid (B, T); example (B,); whatever an objective's `prepare` adds."""


@dataclass(frozen=True)
class Facts:
    """What an objective may know of the data, and of runs beside the one that begins.

    Attributes:
        vocabulary: number of token ids.
        mask, pad, separator: ids of special tokens, None where there is none.
        classes: number of labels, None where examples have none.
        init_from: the run that training starts from, None where there is none.
        load: the trained model of a run's directory, on the CPU; None where runs are out of reach.
        model: spec of the model that is trained, for an objective with a network like it.
        frequencies: gives how often each token is in the training split, int64 (V,); None where there are no tokens.
        tokenizer: turns ids into text, None where the data are no text.
        tokenizer_of: the tokenizer of a run's directory, None where the run has none; None where runs are out of reach.
        rows: columns of each example by its number, None where the data keep none.
    """

    vocabulary: int | None = None
    mask: int | None = None
    pad: int | None = None
    separator: int | None = None
    classes: int | None = None
    init_from: str | None = None
    load: Callable[[str], nn.Module] | None = None
    model: Any = None
    frequencies: Callable[[], torch.Tensor] | None = None
    tokenizer: Any = None
    tokenizer_of: Callable[[str], Any] | None = None
    rows: Mapping[int, Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Term:
    """One term of a loss: `total` is a sum, `over` names the count that it is divided by."""

    total: torch.Tensor
    over: str = "targets"
    weight: float = 1.0


@dataclass(frozen=True)
class Result:
    """What an objective gives.

    Attributes:
        terms: of the loss.
        metrics: as (sum, count).
        nll_BT: negative log-likelihood of each target in nats, zero where there is none; from `Objective.evaluate` of
            an objective that codes text.
        predicted_BT: the likeliest token in the place of each target, -1 where there is none; from
            `Objective.evaluate`, where asked for.
        scores: as (sum, count), from `Objective.evaluate`: what evaluation reports beside the loss.
    """

    terms: dict[str, Term]
    metrics: Aux = field(default_factory=dict)
    nll_BT: torch.Tensor | None = None
    predicted_BT: torch.Tensor | None = None
    scores: Aux = field(default_factory=dict)

    @classmethod
    def of(cls, terms: dict[str, Term], aux: Aux) -> Result:
        """Terms, and a model's `aux`: names ending in ``_loss`` become terms over "tokens", the rest metrics."""
        losses = {name: Term(total, "tokens") for name, (total, _) in aux.items() if name.endswith("_loss")}
        return cls({**terms, **losses}, {name: value for name, value in aux.items() if name not in losses})


class ObjectiveSpec(PartSpec):
    """What is minimised."""

    family: ClassVar[str] = "objective"
    default_kind: ClassVar[str] = "causal_lm"
    paired: ClassVar[bool] = False
    """Whether it compares two rows an example, and so needs data that give pairs."""
    example: ClassVar[str | None] = "tokens"
    """What an example is made of, as `torchstone.data.DataSpec.example`; None where it does not matter."""

    def build(self, facts: Facts) -> Objective:
        """The module.

        Raises:
            TorchstoneError: the data lacks what the objective needs (a mask token).
        """
        raise NotImplementedError


class Objective(nn.Module):
    """What an objective kind builds. Its parameters, if it has any, are trained and saved beside the model's."""

    couples: ClassVar[bool] = False
    """Whether the loss of one example depends on the others of its batch."""
    codes: ClassVar[bool] = False
    """Whether the loss is the code length of the text, so that bits per byte mean something."""
    reference: nn.Module | None = None
    """A frozen model that the loss reads beside the one that trains: neither trained nor saved."""
    rounds: int = 1
    """Steps of the optimiser for each batch that `collect` made: each takes a part of its rows."""

    def check(self, model: nn.Module) -> None:
        """Refuse a model that this loss makes no sense for, and a checkpoint that this objective cannot go on from:
        asked before training, and again after a checkpoint was read.

        Raises:
            TorchstoneError: says what the model lacks.
        """

    def before_step(self, model: nn.Module, step: int) -> None:
        """Before the first micro-batch of a step, on every rank: what learns by a rule of its own, such as the other
        side of a game, learns here from the model as it is. Such weights take no gradient."""

    def prepare(self, batch: Batch, key: Key) -> Batch:
        """The batch with whatever is drawn or derived before a model sees it."""
        return batch

    def collect(self, model: nn.Module, batch: Batch, key: Key) -> Batch:
        """The prepared batch with what the present model adds before it is cut and counted, as samples from it. Rows
        may multiply, by one number for all. Called without gradients and without dropout."""
        return batch

    def agree(self, batches: list[Batch], total: Callable[[torch.Tensor], torch.Tensor]) -> list[Batch]:
        """All micro-batches that `collect` made for a step, with what hangs on them all. `total` adds a tensor up over
        ranks."""
        return batches

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Denominators by name, 0-dimensional, on any device: "tokens" (valid ones) and those that terms are over."""
        raise NotImplementedError

    def forward(self, model: nn.Module, batch: Batch, key: Key | None) -> Result:
        """Terms of a prepared batch. `key` None means evaluation: nothing is dropped."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, batch: Batch, predict: bool = False) -> Result:
        """As `forward` without a key, for measuring: an objective that scores tokens one by one gives their scores too,
        and with `predict` its likeliest tokens. Called without gradients."""
        return self(model, batch, None)


def tokens_of(batch: Batch, ids: torch.Tensor | None = None) -> Tokens:
    """The batch's columns as `Tokens`, with other ids in their place if given."""
    columns = {
        name: batch[name] for name in ("start", "position", "segment", "modality", "role", "valid") if name in batch
    }
    return Tokens.of(batch["ids"] if ids is None else ids, **columns)
