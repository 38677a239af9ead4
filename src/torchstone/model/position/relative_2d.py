"""Relative positions of patches in a grid (Bao et al. 2022, arXiv 2106.08254, appendix; Raffel et al. 2019, arXiv
1910.10683, for the idea): a learned number per head and offset.

    score[i, j] += table[row_i - row_j, column_i - column_j],   rows of the table: (2 S - 1)^2, and 3 with a class token

The three are for the class token's view of a patch, a patch's of it, and its own of itself. One table serves all layers
of a stack (pre-training), or each has its own (fine-tuning). The table starts at zero.

A run's table is taken over by name; layers with tables of their own take the shared one where the run has no more, and
a grid of another side the run's values in between: bicubic over offsets, measured in sides of the grid, as in the
published fine-tuning at another resolution, whose source coordinates are spaced geometrically instead.

Shapes: B rows, H heads, S patches of a side, T queries, K keys, R rows of the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.model.position import Position, PositionSpec
from torchstone.model.tokens import Tokens

__all__ = ["Relative2DPosition", "Relative2DSpec", "resized"]


class Relative2DSpec(PositionSpec):
    """A learned score bias per head and offset in a square grid of patches."""

    gives: ClassVar[Literal["bias"]] = "bias"
    paper: ClassVar[str] = "Bao et al. 2022, arXiv 2106.08254"

    side: int | None = Field(None, ge=1, le=2**12)
    """Patches of a side; null takes the embedding's."""
    class_token: bool = True
    """Whether the first token is none of the grid."""
    shared: bool = True
    """One table for all layers, or one for each."""

    @property
    def scope(self) -> Literal["model", "layer"]:  # type: ignore[override]
        return "model" if self.shared else "layer"

    def unfit(self, tokens: int | None, context: int | None) -> str | None:
        if self.side is None and (tokens is None or context not in (None, tokens)):
            return "position relative_2d: needs `side`, the patches of a side of its grid"
        patches = None if tokens is None else tokens - self.class_token
        side = self.side or math.isqrt(patches or 0)
        if patches is not None and patches != side**2:
            one = " and a class token" if self.class_token else ""
            return (
                f"position relative_2d: a grid of {side} x {side} patches{one} is not the embedding's {tokens} tokens"
            )
        return None

    def build(self, dim: int, heads: int, width: int, context: int, causal: bool) -> Position:
        return Relative2DPosition(self, self.side or math.isqrt(context - self.class_token), heads)


class Relative2DPosition(Position):
    """A table (R, H)."""

    def __init__(self, spec: Relative2DSpec, side: int, heads: int) -> None:
        super().__init__()
        self.side, self.special = side, 3 * spec.class_token
        self.first = int(spec.class_token)
        self.limit = side**2 + self.first
        self.weight = nn.Parameter(torch.empty((2 * side - 1) ** 2 + self.special, heads))

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        parameter.zero_()

    def bias(self, q: Tokens, k: Tokens) -> torch.Tensor:
        return F.embedding(self.rows(q.where, k.where), self.weight).permute(0, 3, 1, 2)

    def rows(self, of_BT: torch.Tensor, to_BK: torch.Tensor) -> torch.Tensor:
        """Rows of the table (B, T, K) for pairs of positions; 0 is the class token, if there is one."""
        S = self.side
        at_BT1, to_B1K = of_BT[:, :, None] - self.first, to_BK[:, None, :] - self.first
        down = at_BT1.div(S, rounding_mode="floor") - to_B1K.div(S, rounding_mode="floor")
        row = (down + S - 1) * (2 * S - 1) + at_BT1.remainder(S) - to_B1K.remainder(S) + S - 1
        if not self.first:
            return row
        offsets = (2 * S - 1) ** 2
        special = torch.where(to_B1K < 0, offsets + 1, offsets)  # a patch's view of it; its view of a patch
        special = torch.where((at_BT1 < 0) & (to_B1K < 0), offsets + 2, special)
        return torch.where((at_BT1 < 0) | (to_B1K < 0), special, row)

    def adopt(self, name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """The table that the parameter `name` takes from those of a run; None where the run has none.

        Raises:
            TorchstoneError: the run's has other heads, or a class token where this one has none.
        """
        shared = f"{name.rpartition('.relative_2d')[0]}.relative_2d.weight"
        source = next((each for each in (name, shared) if each in tensors), None)
        if source is None:
            return None
        table_RH = tensors[source]
        side = (math.isqrt(max(0, len(table_RH) - self.special)) + 1) // 2
        if table_RH.shape[1] != self.weight.shape[1] or (2 * side - 1) ** 2 + self.special != len(table_RH):
            raise TorchstoneError(
                f"{source} is {tuple(table_RH.shape)}, which is no table for {self.weight.shape[1]} heads and "
                f"{self.special} special rows"
            )
        return table_RH if side == self.side else resized(table_RH, side, self.side)


def resized(table_RH: torch.Tensor, side: int, to: int) -> torch.Tensor:
    """A table of a grid of `side` patches for one of `to`; special rows stay.

    Offsets keep their size in pictures: the largest, side - 1 patches, becomes to - 1.
    """
    reach, wide = 2 * side - 1, 2 * to - 1
    grid_1HRR = table_RH[: reach**2].T.reshape(1, -1, reach, reach).float()
    made = F.interpolate(grid_1HRR, (wide, wide), mode="bicubic", align_corners=True)
    return torch.cat([made[0].flatten(1).T.to(table_RH.dtype), table_RH[reach**2 :]])
