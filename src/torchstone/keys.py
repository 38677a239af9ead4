"""Keys: every random draw is a pure function of a seed and the names of what is drawn.

A `Key` is a 64-bit value. `fold` derives a new key from names and numbers, so that two draws share bits only if they
share their whole path: ``Key(seed).fold("init", "decoder.layers.3.attention.qkv.weight")``. Nothing here keeps state;
order of calls, number of workers and resuming therefore change nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    import torch

__all__ = ["Key"]


@dataclass(frozen=True)
class Key:
    """A 64-bit name for a stream of random numbers."""

    value: int

    def fold(self, *path: str | int) -> Key:
        """The key of `path` under this one. Strings and integers are distinguished: ``fold(1) != fold("1")``."""
        digest = hashlib.blake2b(self.value.to_bytes(16, "little", signed=True), digest_size=8)
        for part in path:
            text = part.encode() if isinstance(part, str) else str(int(part)).encode()
            digest.update(b"s" if isinstance(part, str) else b"i")
            digest.update(len(text).to_bytes(4, "little"))
            digest.update(text)
        return Key(int.from_bytes(digest.digest(), "little", signed=True))

    def generator(self) -> torch.Generator:
        """A CPU generator. Values drawn on the CPU are the same whatever device they are then moved to."""
        import torch

        return torch.Generator().manual_seed(self.value & (2**63 - 1))

    def numpy(self) -> numpy.random.Generator:
        """A NumPy generator (Philox) seeded with this key."""
        import numpy

        return numpy.random.Generator(numpy.random.Philox(self.value & (2**64 - 1)))

    def tensor(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The key as a 0-dimensional int64 tensor, for `torchstone.ops.noise`: a new key then recompiles nothing."""
        import torch

        return torch.tensor(self.value, dtype=torch.int64, device=device)
