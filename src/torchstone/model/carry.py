"""Carry: what a model takes from one batch into the next, where rows of batches are streams.

A model says what it carries by a method ``carry(rows)`` that gives a `Carry`, or None; a stack of the backbone by
``carry(rows, dtype, device)``. The trainer gives the carry to every forward, forgets what the column ``begins`` of a
batch tells it to, and commits after the optimiser's move. Its tensors lie in checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

__all__ = ["Carry", "Carrying", "carry_of"]


class Carry(Protocol):
    """State of the rows of a batch that outlives a step. Nothing in it is differentiated."""

    def arguments(self) -> dict[str, Any]:
        """Of the model's forward, by name: with them it reads this and holds what is to be kept."""
        ...

    def commit(self) -> None:
        """Keep what the last forward held. Until then, forwards and backward passes see what was there before."""
        ...

    def forget(self, rows: Sequence[int]) -> None:
        """Put rows back to where a stream begins."""
        ...

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """All of it, by name."""
        ...

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Become what gave these `tensors()`.

        Raises:
            TorchstoneError: they are of another model, or of another number of rows.
        """
        ...


def carry_of(model: nn.Module, rows: int) -> Carry | None:
    """What a model carries for this many rows, empty; None if it carries nothing. A backbone carries what its stack
    does, where its parameters lie."""
    if make := getattr(model, "carry", None):
        return make(rows)
    if make := getattr(getattr(model, "main", None), "carry", None):
        weight = next(model.parameters())
        return make(rows, weight.dtype, weight.device)
    return None


class Carrying:
    """A model together with what it carries: stands in its place where an objective calls it once."""

    def __init__(self, model: nn.Module, carry: Carry) -> None:
        self._model, self._carry = model, carry

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self._model(*inputs, **options, **self._carry.arguments())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
