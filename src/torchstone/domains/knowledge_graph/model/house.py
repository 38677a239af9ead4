"""HousE (Li et al. 2022, arXiv 2202.07919): a relation is a product of Householder reflections, which is any rotation
of blocks of k numbers, after contractions that are its own for heads and for tails.

    Rot(U) = H(u_1) ... H(u_2m),   2m = 2 floor(k/2)        H(u) x = x - 2 (u . x) u
    Pro(P, t) = M(p_1, t_1) ... M(p_c, t_c)                 M(p, t) x = x - t (p . x) p
    s(h, r, t) = gamma - sum over blocks | Rot(U_r) (Pro(P_r1, t_r1) h + b_r) - Pro(P_r2, t_r2) t |

Variants of the paper: HousE-r has no contractions (``projections: 0``), HousE has them, and HousE-r+ and HousE+ add
b_r (``translation: true``). Where a head is sought the inverse rotation is applied to the tail, which gives the same
number, so that the chain runs once for all candidates.

Shapes: B rows, N candidates, R relations, n blocks of k numbers, C reflections or contractions.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import nn

from torchstone.domains.knowledge_graph.model._scorer import Scorer, ScorerSpec
from torchstone.ops.householder import householder

__all__ = ["HousE", "HousESpec"]


class HousESpec(ScorerSpec):
    """A relation is a rotation of blocks by reflections, after contractions of head and tail."""

    paper: ClassVar[str] = "Li et al. 2022, arXiv 2202.07919"

    block: int = Field(8, ge=2, le=2**10)
    """Numbers of a block (k). What `dim` holds beyond whole blocks is not used."""
    projections: int = Field(1, ge=0, le=2**10)
    """Contractions of the head, and of the tail; 0 is HousE-r, rotation alone."""
    max_strength: float = Field(0.5, gt=0, lt=1)
    """Upper bound of a contraction's strength; below 1 it keeps its inverse."""
    translation: bool = False
    """Add a vector to the head before it is rotated: HousE-r+ and HousE+."""

    @model_validator(mode="after")
    def _fits(self) -> HousESpec:
        if self.block > self.dim:
            raise ValueError(f"block {self.block} is larger than dim {self.dim}")
        return self

    @property
    def block_size(self) -> int:
        return self.block

    @property
    def spread(self) -> float:
        return super().spread / math.sqrt(self.block)

    def build(self) -> nn.Module:
        return HousE(self)


class HousE(Scorer):
    """Directions are of any length and made unit vectors in every forward.

    Attributes:
        rotation: (R, n, C, k), directions of the reflections.
        projection: (2, R, n, C, k), directions of the contractions of heads (0) and of tails (1).
        strength: (2, R, 1, C), and `scale` (2, R, n, C): a contraction's strength is one times the size of the other.
        translation: (R, n, k); None without.
    """

    def __init__(self, spec: HousESpec) -> None:
        super().__init__(spec)
        relations, k, some = spec.sizes()[1], spec.block, spec.projections
        n = spec.dim // k
        self.rotation = nn.Parameter(torch.empty(relations, n, 2 * (k // 2), k))
        self.translation = nn.Parameter(torch.empty(relations, n, k)) if spec.translation else None
        if some:
            self.projection = nn.Parameter(torch.empty(2, relations, n, some, k))
            self.strength = nn.Parameter(torch.empty(2, relations, 1, some))
            self.scale = nn.Parameter(torch.empty(2, relations, n, some))

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        if name == "strength":
            parameter[0].uniform_(-0.01, 0.01, generator=generator)
            parameter[1] = -parameter[0]
        elif name == "scale":
            parameter.uniform_(-1, 1, generator=generator)
        else:
            super().initialise(name, parameter, generator)

    def strengths(self) -> torch.Tensor:
        """Of all contractions (2, R, n, C): at most `max_strength`, as far below zero as they learn to be."""
        return (self.strength * self.scale.abs()).clamp(max=self.spec.max_strength)

    def _contracted(self, x_BNnk: torch.Tensor, relation_B: torch.Tensor, of_tails_B: torch.Tensor) -> torch.Tensor:
        """Vectors (B or 1, N, n, k) after the contractions of their relation and end."""
        if not self.spec.projections:
            return x_BNnk
        end_B = of_tails_B.long()
        directions_BnCk, strengths_BnC = self.projection[end_B, relation_B], self.strengths()[end_B, relation_B]
        return householder(x_BNnk, directions_BnCk[:, None], strengths_BnC[:, None])

    def carry(self, x_BD: torch.Tensor, relation_B: torch.Tensor, seeks_head_B: torch.Tensor) -> torch.Tensor:
        x_Bnk = x_BD.unflatten(-1, (-1, self.spec.block))
        x_Bnk = self._contracted(x_Bnk[:, None], relation_B, seeks_head_B)[:, 0]
        back_B11 = seeks_head_B[:, None, None]
        u_BnCk = self.rotation[relation_B]
        u_BnCk = torch.where(back_B11[..., None], u_BnCk.flip(-2), u_BnCk)  # the inverse is the reverse order
        added_Bnk = 0.0 if self.translation is None else self.translation[relation_B]
        x_Bnk = x_Bnk + torch.where(back_B11, 0.0, added_Bnk)
        x_Bnk = householder(x_Bnk, u_BnCk)
        return (x_Bnk - torch.where(back_B11, added_Bnk, 0.0)).flatten(-2)

    def place(self, y_BND: torch.Tensor, relation_B: torch.Tensor, seeks_head_B: torch.Tensor) -> torch.Tensor:
        y_BNnk = y_BND.unflatten(-1, (-1, self.spec.block))
        return self._contracted(y_BNnk, relation_B, ~seeks_head_B).flatten(-2)
