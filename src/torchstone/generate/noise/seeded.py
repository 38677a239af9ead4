"""Noise by (seed, request, step): each generation has a stream of its own.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from torchstone.generate.noise import NoiseSource, NoiseSpec, Request
from torchstone.keys import Key
from torchstone.ops import noise

__all__ = ["SeededNoise", "SeededSpec"]


class SeededSpec(NoiseSpec):
    """Noise by seed, request and step."""

    seed: int = 0
    """Seed of all streams."""

    def build(self) -> NoiseSource:
        return SeededNoise(self.seed)


@dataclass(frozen=True)
class SeededNoise:
    """See `SeededSpec`."""

    seed: int = 0
    _keys: dict[tuple[Request, ...], torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def gumbel(
        self, requests: Sequence[Request], step: int, vocabulary: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Float64 (B, V)."""
        names = tuple(requests)
        if names not in self._keys:
            self._keys.clear()  # rows leave a batch but never come back
            self._keys[names] = torch.tensor([self.key(name) for name in names], dtype=torch.int64)
        return noise.gumbel(noise.mix(self._keys[names].to(device), step), vocabulary)

    def key(self, request: Request) -> int:
        """The 64 bits that a request's stream begins with."""
        return Key(self.seed).fold("sample", request).value
