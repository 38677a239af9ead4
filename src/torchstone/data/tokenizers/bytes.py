"""Bytes: the id of a byte is its value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torchstone.data.tokenizers import TokenizerSpec

if TYPE_CHECKING:
    from torchstone.data.store import Cache
    from torchstone.data.tokenizer import Tokenizer

__all__ = ["BytesSpec"]


class BytesSpec(TokenizerSpec):
    """UTF-8 bytes: ids 0 to 255 are byte values, followed by the separator, mask and padding tokens (259 ids)."""

    def size(self) -> int:
        return 259

    def load(self, documents: Callable[[], Iterator[str]], content_hash: str, cache: Cache) -> Tokenizer:
        from torchstone.data.tokenizer import BYTE_CHARACTERS, byte_level

        return byte_level({character: value for value, character in enumerate(BYTE_CHARACTERS)})
