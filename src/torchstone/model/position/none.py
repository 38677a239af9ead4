"""No position: a causal model still tells order from how many keys a query sees (Haviv et al. 2022, 2203.16634)."""

from __future__ import annotations

from typing import ClassVar

from torchstone.model.position import Position, PositionSpec

__all__ = ["NoneSpec"]


class NoneSpec(PositionSpec):
    """No position information besides the mask."""

    paper: ClassVar[str] = "Haviv et al. 2022, arXiv 2203.16634"

    def build(self, dim: int, heads: int, width: int, context: int, causal: bool) -> Position:
        return Position()
