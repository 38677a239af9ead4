"""Numbers in a few bits, packed into bytes: `pack`, `unpack`, and how many bytes that takes."""

from __future__ import annotations

from torchstone.ops.packed.reference import BITS, pack, packed_bytes, unpack

__all__ = ["BITS", "pack", "packed_bytes", "unpack"]
