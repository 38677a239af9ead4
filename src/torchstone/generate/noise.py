"""Noise sources: where the randomness of a sample comes from.

A token is ``argmax(scores + gumbel)`` (the Gumbel-max trick), an exact sample of ``softmax(scores)``. The noise is a
pure function of who asks and of the step, never of a generator's state, so a sample does not depend on its batch.
Methods that choose the noise otherwise (shared between users, carrying a watermark) are other sources.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from torchstone.keys import Key
from torchstone.ops import noise

__all__ = ["NoiseSource", "Request", "SeededNoise"]

Request = int | str
"""Name of a generation within a seed: the same name gets the same noise."""


class NoiseSource(Protocol):
    """What `Sampling.choose` asks for noise."""

    def gumbel(
        self, requests: Sequence[Request], step: int, vocabulary: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Standard Gumbel noise (B, V) for new token number `step` (from 0) of each request.

        Row b depends on ``requests[b]`` and `step` alone.
        """
        ...


@dataclass(frozen=True)
class SeededNoise:
    """Noise by (seed, request, step)."""

    seed: int = 0
    _keys: dict[tuple[Request, ...], torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def gumbel(
        self, requests: Sequence[Request], step: int, vocabulary: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Float64 (B, V)."""
        names = tuple(requests)
        if names not in self._keys:
            self._keys.clear()  # rows leave a batch but never come back
            values = [Key(self.seed).fold("sample", name).value for name in names]
            self._keys[names] = torch.tensor(values, dtype=torch.int64)
        return noise.gumbel(noise.mix(self._keys[names].to(device), step), vocabulary)
