"""What models of a knowledge graph share: a matrix of entities, and the score of a triple,

    s = gamma - sum over n blocks of |x - y|        (lengths of blocks: L2 inside, L1 across)

where x is the given entity carried to the side of the one that is sought, and y a candidate for it. Either end may be
sought; a row's two scores of one triple, by its head and by its tail, agree.

Shapes: B rows, N candidates, E entities, R relations, D = n k numbers of an entity, n blocks of k numbers.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.model import ModelSpec

__all__ = ["Scorer", "ScorerSpec"]

_AT_ONCE = 1 << 24
"""Numbers of candidates that are made at once where all entities are scored without gradients."""
_EPSILON = 2.0
"""Added to gamma in the range of first values (the reference code of Sun et al. 2019)."""


class ScorerSpec(ModelSpec):
    """A model that scores triples. The data fill in how many entities and relations there are."""

    example: ClassVar[str | None] = "triples"

    entities: int | None = Field(None, ge=1, lt=2**31)
    """Number of entities (E); null takes it from the data."""
    relations: int | None = Field(None, ge=1, lt=2**31)
    """Number of relations (R); null takes it from the data."""
    dim: int = Field(200, ge=1, le=2**20)
    """Numbers of an entity (D)."""
    gamma: float = Field(12.0, gt=0, le=10**4)
    """Score of a triple whose distance is zero; the range of first values grows with it."""

    @property
    def block_size(self) -> int:
        """Numbers of a block (k)."""
        raise NotImplementedError

    @property
    def spread(self) -> float:
        """First values of entities are uniform between this and its negative."""
        return (self.gamma + _EPSILON) / (self.dim // self.block_size)

    def sizes(self) -> tuple[int, int]:
        """Entities and relations.

        Raises:
            TorchstoneError: one of them is open.
        """
        if self.entities is None or self.relations is None:
            open_ = "entities" if self.entities is None else "relations"
            raise TorchstoneError(f"model.{open_}: is required to build the model (a recipe takes it from its data)")
        return self.entities, self.relations


class Scorer(nn.Module):
    """Base of the models: `carry` moves the given end, `place` the candidates.

    Attributes:
        entity: (E, D).
        inactive_parameters: those that one triple does not meet, for `torchstone.model.measure`.
    """

    def __init__(self, spec: ScorerSpec) -> None:
        super().__init__()
        self.spec: Any = spec
        self.entity = nn.Parameter(torch.empty(spec.sizes()[0], spec.dim // spec.block_size * spec.block_size))

    @property
    def inactive_parameters(self) -> int:
        entities, relations = self.spec.sizes()
        table = self.entity.numel()
        others = sum(parameter.numel() for parameter in self.parameters()) - table
        return table - min(2, entities) * table // entities + others - others // relations

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        parameter.uniform_(-self.spec.spread, self.spec.spread, generator=generator)

    def carry(self, x_BD: torch.Tensor, relation_B: torch.Tensor, seeks_head_B: torch.Tensor) -> torch.Tensor:
        """The given end, head or tail, on the side of the other: (B, D)."""
        raise NotImplementedError

    def place(self, y_BND: torch.Tensor, relation_B: torch.Tensor, seeks_head_B: torch.Tensor) -> torch.Tensor:
        """Candidates as they are compared: (B, N, D), or (1, N, D) where neither relation nor end matters."""
        return y_BND

    def forward(
        self,
        given_B: torch.Tensor,
        relation_B: torch.Tensor,
        seeks_head_B: torch.Tensor,
        candidate_BN: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores (B, N), the higher the better.

        Args:
            given_B: number of the tail where the head is sought, else of the head.
            relation_B: number of the relation.
            seeks_head_B: whether the candidates are heads.
            candidate_BN: numbers of the candidates; None scores all entities (B, E).
        """
        carried_BD = self.carry(self.entity[given_B], relation_B, seeks_head_B)

        def scores(y_BND: torch.Tensor) -> torch.Tensor:
            apart_BND = carried_BD[:, None] - self.place(y_BND, relation_B, seeks_head_B)
            apart_BNnk = apart_BND.unflatten(-1, (-1, self.spec.block_size))
            return self.spec.gamma - torch.linalg.vector_norm(apart_BNnk, dim=-1).sum(-1)

        if candidate_BN is not None:
            return scores(self.entity[candidate_BN])
        if torch.is_grad_enabled():
            return scores(self.entity[None])
        at_once = max(1, _AT_ONCE // max(1, carried_BD.numel()))
        return torch.cat([scores(some_ND[None]) for some_ND in self.entity.split(at_once)], 1)
