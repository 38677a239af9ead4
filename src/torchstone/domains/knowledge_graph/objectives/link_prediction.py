"""Link prediction with self-adversarial negatives (Sun et al. 2019, arXiv 1902.10197, eq. 5), and filtered ranks.

    L = -1/2 [ mean_w log sigmoid(s+)  +  mean_w sum_j p_j log sigmoid(-s-_j) ] + regulariser * mean_e |E_e|
    p = softmax_j(temperature * s-_j), taken as numbers

mean_w is the mean over rows by their weights. Scores: the rank of an answer among all entities but the other known
answers, from both ends of each fact, as its mean reciprocal (``mrr``) and shares within 1, 3 and 10. Among equal scores
the rank is the mean one, so that a model that knows nothing is in the middle.

Shapes: B rows, N negatives, E entities.
"""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import logsigmoid

from torchstone.domains.knowledge_graph.model._scorer import Scorer
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.context import Aux
from torchstone.objectives import Batch, Facts, Objective, ObjectiveSpec, Result, Term

__all__ = ["LinkPrediction", "LinkPredictionSpec", "filtered_ranks", "ranks"]


class LinkPredictionSpec(ObjectiveSpec):
    """Score facts above negatives, the hardest of them most."""

    paper: ClassVar[str] = "Sun et al. 2019, arXiv 1902.10197"
    example: ClassVar[str | None] = "triples"

    temperature: float = Field(1.0, ge=0, le=100)
    """How much more negatives of high scores count; 0 counts all alike."""
    weighted: bool = True
    """Whether rows of frequent queries count less (sub-sampling)."""
    regulariser: float = Field(0.0, ge=0, le=100)
    """Factor on the mean length of the entities' vectors."""

    def build(self, facts: Facts) -> Objective:
        return LinkPrediction(self)


class LinkPrediction(Objective):
    """Batch: as `torchstone.domains.knowledge_graph.data.triples.Triples` gives them; `evaluate` needs ``known``."""

    def __init__(self, spec: LinkPredictionSpec) -> None:
        super().__init__()
        self.spec = spec

    def check(self, model: nn.Module) -> None:
        if not isinstance(model, Scorer):
            raise TorchstoneError(
                "objective link_prediction: needs a model that scores triples (transe, rotate, house)"
            )
        dim, block = model.spec.dim, model.spec.block_size
        if dim % block:  # published settings have it: 800 numbers in blocks of 13
            blocks = dim // block
            text = f"model.block: {dim} numbers are {blocks} blocks of {block}; {blocks * block} are used"
            warnings.warn(text, stacklevel=1)  # of this line, so that a training says it once

    def _weight(self, batch: Batch) -> torch.Tensor:
        return batch["weight"] if self.spec.weighted else torch.ones_like(batch["weight"])

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        rows = torch.tensor(len(batch["head"]))
        # in float64, wherever the device may be: what the sum is, no split into micro-batches changes
        return {"weights": self._weight(batch).cpu().double().sum(), "rows": rows, "tokens": rows}

    def forward(self, model: nn.Module, batch: Batch, key: Key | None) -> Result:
        given_B, sought_B = _ends(batch)
        relation_B, seeks_head_B = batch["relation"], batch["seeks_head"]
        candidates_BN = torch.cat([sought_B[:, None], batch["negative"]], 1)
        fact_B1, negative_BN = model(given_B, relation_B, seeks_head_B, candidates_BN).split(
            (1, candidates_BN.shape[1] - 1), 1
        )
        share_BN = (self.spec.temperature * negative_BN.detach()).softmax(1)
        each_B = logsigmoid(fact_B1[:, 0]) + (share_BN * logsigmoid(-negative_BN)).sum(1)
        terms = {"loss": Term((self._weight(batch) * each_B).sum(), "weights", -0.5)}
        if self.spec.regulariser:
            mean = torch.linalg.vector_norm(model.entity, dim=1).mean()
            terms["regulariser"] = Term(len(given_B) * mean, "rows", self.spec.regulariser)
        return Result(terms)

    def evaluate(self, model: nn.Module, batch: Batch, predict: bool = False) -> Result:
        rank_B = ranks(model, batch)
        rows = torch.tensor(len(rank_B), device=rank_B.device)
        scores: Aux = {"mrr": ((1 / rank_B).sum(), rows)}
        scores |= {f"hits@{most}": ((rank_B <= most).sum(), rows) for most in (1, 3, 10)}
        return Result(self(model, batch, None).terms, scores=scores)


def _ends(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The end that is given, and the one that is sought, (B,) each."""
    head_B, tail_B = batch["head"], batch["tail"]
    seeks_head_B = batch["seeks_head"]
    return torch.where(seeks_head_B, tail_B, head_B), torch.where(seeks_head_B, head_B, tail_B)


def ranks(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Filtered ranks (B,) of what each row of an evaluation's batch seeks; see `filtered_ranks`."""
    given_B, sought_B = _ends(batch)
    return filtered_ranks(model(given_B, batch["relation"], batch["seeks_head"]), sought_B, batch["known"])


def filtered_ranks(score_BE: torch.Tensor, sought_B: torch.Tensor, known_BE: torch.Tensor) -> torch.Tensor:
    """Ranks from 1, float (B,), of the answers among the entities that are no other known answer: the mean rank among
    equal scores, and the last for a score that is no number.

    Args:
        score_BE: of all entities; a model may know more of them than the data.
        sought_B: the answers.
        known_BE: the known answers other than those.
    """
    score_BE = score_BE[:, : known_BE.shape[1]].masked_fill(known_BE, -torch.inf)
    own_B1 = score_BE.gather(1, sought_B[:, None])
    candidates_B, lower_B = (~known_BE).sum(1), ((score_BE < own_B1) & ~known_BE).sum(1)
    equal_B = ((score_BE == own_B1) & ~known_BE).sum(1).clamp(min=1)
    return candidates_B - lower_B - (equal_B - 1) / 2
