"""TransE (Bordes et al. 2013, NeurIPS 26): a relation is a vector that is added to the head."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from torchstone.domains.knowledge_graph.model._scorer import Scorer, ScorerSpec

__all__ = ["TransE", "TransESpec"]


class TransESpec(ScorerSpec):
    """A relation is a vector from head to tail, distances are L1."""

    paper: ClassVar[str] = "Bordes et al. 2013, NeurIPS 26"

    @property
    def block_size(self) -> int:
        return 1

    def build(self) -> nn.Module:
        return TransE(self)


class TransE(Scorer):
    """`relation` (R, D)."""

    def __init__(self, spec: TransESpec) -> None:
        super().__init__(spec)
        self.relation = nn.Parameter(torch.empty(spec.sizes()[1], spec.dim))

    def carry(self, x_BD: torch.Tensor, relation_B: torch.Tensor, seeks_head_B: torch.Tensor) -> torch.Tensor:
        relation_BD = self.relation[relation_B]
        return x_BD + torch.where(seeks_head_B[:, None], -relation_BD, relation_BD)
