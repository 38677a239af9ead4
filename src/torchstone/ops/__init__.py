"""Operations with a reference each. This layer imports torch alone.

An op is a folder: `reference.py` is the definition in plain PyTorch (at least float32), the other files are fast paths
that agree with it forwards and backwards, and `__init__.py` dispatches by device and shape, never by timing.
``TORCHSTONE_OPS=reference`` forces the definition everywhere.
"""

from __future__ import annotations

import os

import torch

__all__ = ["at_least_float32", "forced_reference"]


def forced_reference() -> bool:
    """Whether ``TORCHSTONE_OPS=reference`` asks for the definitions."""
    return os.environ.get("TORCHSTONE_OPS") == "reference"


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, or unchanged where it is wider: float64 checks must stay float64."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
