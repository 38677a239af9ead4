"""Hashes and the keyed permutation: everything that decides a side or an order from content, without state."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torchstone.keys import Key

__all__ = ["digest", "mix", "permute"]

_ROUNDS = 6


def digest(*parts: Any) -> str:
    """32 hex digits that identify the texts of `parts`, in order."""
    hasher = hashlib.blake2b(digest_size=16)
    for item in parts:
        raw = str(item).encode()
        hasher.update(len(raw).to_bytes(8, "little") + raw)
    return hasher.hexdigest()


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 whose output bits all depend on all input bits (the finaliser of splitmix64)."""
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = x ^ (x >> np.uint64(27))
    x = x * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, size: int, key: Key) -> np.ndarray:
    """Where a pseudo-random permutation of ``range(size)`` sends each entry of `index`, in constant memory.

    A Feistel network over the smallest even number of bits that holds `size`, walked along its cycle until the value is
    inside the range; the domain is at most four times too large, so a walk has at most four steps on average.

    Args:
        index: int64, any shape, entries in [0, size).
        size: at least 1.
        key: names the permutation.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low, shift = np.uint64((1 << half) - 1), np.uint64(half)
    keys = [np.uint64(key.fold("round", number).value & (2**64 - 1)) for number in range(_ROUNDS)]

    def once(x: np.ndarray) -> np.ndarray:
        left, right = x >> shift, x & low
        for round_key in keys:
            left, right = right, left ^ (mix(right ^ round_key) & low)
        return (left << shift) | right

    out = once(np.asarray(index).astype(np.uint64))
    while (outside := out >= np.uint64(size)).any():
        out[outside] = once(out[outside])
    return out.astype(np.int64)
