"""Counter-based random numbers from the SplitMix64 finaliser (Steele, Lea and Flood 2014).

Integer arithmetic on int64 wraps modulo 2^64, so the same key and counter give the same bits everywhere. Nothing holds
a state: dropout recomputed under activation checkpointing is the same dropout, and a sample does not depend on what
else is in its batch.
"""

from __future__ import annotations

import torch

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MUL1 = 0xBF58476D1CE4E5B9 - 2**64
_MUL2 = 0x94D049BB133111EB - 2**64


def _shift(x: torch.Tensor, n: int) -> torch.Tensor:
    """Logical right shift of int64: torch's is arithmetic."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _steps(counter: torch.Tensor) -> torch.Tensor:
    """``(counter + 1) * _GOLDEN`` modulo 2^64, in a form that Inductor compiles as it is written.

    It turns multiples of `arange` into C++ arithmetic on the loop's counter, where signed overflow is undefined: g++
    then concludes that the loop ends early and the kernel writes past its buffer. Hence two products that stay below
    2^63 for counters below 2^31; and ``-~counter``, because `~` is no index arithmetic, whose steps may be taken in
    32 bits.
    """
    count = -(~counter)
    return count * (_GOLDEN & 0xFFFFFFFF) + ((count * (_GOLDEN >> 32 & 0xFFFFFFFF)) << 32)


@torch.library.custom_op("torchstone::constant_key", mutates_args=())
def constant_key(value: int, device: torch.device) -> torch.Tensor:
    """A key that is the same in every forward, 0-dimensional: for `Key.value` inside what may be compiled.

    Inductor writes a plain constant into the loops of its kernels, where g++ then knows every number that `mix` comes
    to, finds the signed overflow that it is made of, and drops the end of the loop. What an operator gives is unknown.
    """
    return torch.tensor(value, dtype=torch.int64, device=device)


@constant_key.register_fake
def _(value: int, device: torch.device) -> torch.Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


def mix(key: torch.Tensor, counter: torch.Tensor | int) -> torch.Tensor:
    """A new int64 key (broadcast shape) from a key, which is no constant of a compiled function, and a counter."""
    if isinstance(counter, torch.Tensor):
        x = key + _steps(counter)
    else:
        x = key + _wrap((counter + 1) * _GOLDEN)
    x = (x ^ _shift(x, 30)) * _MUL1
    x = (x ^ _shift(x, 27)) * _MUL2
    return x ^ _shift(x, 31)


def _wrap(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def bits(key: torch.Tensor, size: int) -> torch.Tensor:
    """64 random bits each, shape (*key.shape, size)."""
    return mix(key[..., None], torch.arange(size, device=key.device))


def uniform(key: torch.Tensor, size: int) -> torch.Tensor:
    """Uniform float32 in (0, 1), shape (*key.shape, size): 23 bits and a half step, so neither end is reached."""
    return (_shift(bits(key, size), 41).to(torch.float32) + 0.5) * 2.0**-23


def gumbel(key: torch.Tensor, size: int) -> torch.Tensor:
    """Standard Gumbel noise, float64, shape (*key.shape, size).

    53 bits: at 23 the tail is cut at 16.6, which a vocabulary of 100,000 tokens reaches in one step of a hundred.
    """
    u = (_shift(bits(key, size), 11).to(torch.float64) + 0.5) * 2.0**-53
    return -torch.log(-torch.log(u))
