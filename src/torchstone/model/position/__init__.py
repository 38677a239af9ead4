"""Position: turns the positions of tokens into what attention consumes.

A kind gives one of four things: a rotation of queries and keys, a rotation and a decay of scores with distance, a score
bias, or an embedding added to the input; beside one of the first three it may name a kind that is added (`added`).
A decay is no part of the rotation, because caches hold rotated keys and a decayed key would leave the range of numbers:
it is laid on queries and keys when a product is taken (`torchstone.ops.attention.Decay`).

Position modules belong to the stack; an attention holds a key and asks its context.

Shapes: B rows (or 1), H heads, T queries, S keys, K head dimension, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from torchstone.model.tokens import Tokens
from torchstone.ops.attention import Decay
from torchstone.ops.rotate import rotate
from torchstone.spec import PartSpec, lazy_parts

__all__ = ["Position", "PositionSpec", "Positions", "Rotation"]

__getattr__ = lazy_parts(__name__)


@dataclass(frozen=True)
class Rotation:
    """Rotates the pairs (i, i + R/2) of the first R channels of queries and keys; the rest passes.

    `cos`, `sin` (B|1, 1, T, R/2). A kind that scales queries and keys differently overrides `q` and `k`.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False

    def q(self, x_BHTK: torch.Tensor) -> torch.Tensor:
        """Rotated queries."""
        return rotate(x_BHTK, self.cos, self.sin, self.interleaved)

    def k(self, x_BHTK: torch.Tensor) -> torch.Tensor:
        """Rotated keys."""
        return rotate(x_BHTK, self.cos, self.sin, self.interleaved)


class Position(nn.Module):
    """What a position kind builds. A method that it does not override gives None."""

    limit: int | None = None
    """Largest number of positions it knows; None if any."""

    def rotation(self, where_BT: torch.Tensor) -> Rotation | None:
        """Rotation at these positions."""
        return None

    def decay(self, q: Tokens, k: Tokens) -> Decay | None:
        """How products of rotated queries and keys fall with distance."""
        return None

    def bias(self, q: Tokens, k: Tokens) -> torch.Tensor | None:
        """Score bias (B|1, H, T, S)."""
        return None

    def embed(self, where_BT: torch.Tensor) -> torch.Tensor | None:
        """Embedding (B|1, T, D) to add to the input."""
        return None

    def adopt(self, name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """The value that its parameter of this full name takes from the tensors of a run that training starts from, for
        kinds that know better than by name and shape; None leaves it to these."""
        return None


class PositionSpec(PartSpec):
    """How order enters the model."""

    family: ClassVar[str] = "position"
    default_kind: ClassVar[str] = "rotary"
    gives: ClassVar[Literal["nothing", "rotation", "decaying rotation", "bias", "embedding"]] = "nothing"
    scope: ClassVar[Literal["model", "layer"]] = "model"
    """Whether layers that agree in spec and sizes share one module."""
    causal_only: ClassVar[bool] = False
    """Whether it has no bidirectional form."""

    @property
    def added(self) -> PositionSpec | None:
        """The kind whose embedding is added to the input, if any."""
        return self if self.gives == "embedding" else None

    def illegal(self, dim: int) -> str | None:
        """Why heads of dimension `dim` cannot use it, or None."""
        return None

    def unfit(self, tokens: int | None, context: int | None) -> str | None:
        """Why it cannot place inputs of exactly so many tokens (None: of any number), in a model whose spec says this
        `context`; None if it can."""
        return None

    def build(self, dim: int, heads: int, width: int, context: int, causal: bool) -> Position:
        """The module for `heads` heads of `dim`, a stream of `width`, at most `context` positions."""
        raise NotImplementedError


class Positions(nn.ModuleDict):
    """A stack's position modules by key, each made once for the parts that ask alike."""

    def __init__(self, context: int, causal: bool) -> None:
        super().__init__()
        self.context, self.causal = context, causal
        self._made: dict[object, str] = {}

    def modules_by_key(self) -> dict[str, Position]:
        """The modules by key."""
        return dict(self.items())  # type: ignore[arg-type]

    def add(self, spec: PositionSpec, dim: int, heads: int, width: int, group: int = 0) -> str:
        """Key of the module for these arguments, made if it is new; only score biases go by `group`."""
        what = (spec.kind, spec.model_dump_json(), dim, heads, width, group if spec.gives == "bias" else 0)
        if spec.scope == "layer" or what not in self._made:
            same = sum(key == spec.kind or key.startswith(f"{spec.kind}_") for key in self)
            key = f"{spec.kind}_{same}" if same else spec.kind
            self[key] = spec.build(dim, heads, width, self.context, self.causal)
            self._made[what] = key
        return self._made[what]
