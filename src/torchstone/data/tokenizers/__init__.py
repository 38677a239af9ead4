"""Tokenizers: how text becomes ids. One file a kind; each kind loads or trains a `Tokenizer`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar

from torchstone.spec import PartSpec, lazy_parts

if TYPE_CHECKING:
    from torchstone.data.store import Cache
    from torchstone.data.tokenizer import Tokenizer

__all__ = ["TokenizerSpec"]


class TokenizerSpec(PartSpec):
    """What turns text into token ids and back."""

    family: ClassVar[str] = "tokenizer"
    default_kind: ClassVar[str] = "bpe"

    def size(self) -> int | None:
        """Number of ids, where it is known before any text is read."""
        return None

    def load(self, documents: Callable[[], Iterator[str]], content_hash: str, cache: Cache) -> Tokenizer:
        """The tokenizer, trained if the kind learns from text.

        Args:
            documents: starts an iteration over the texts of the train split; a kind that learns nothing ignores it.
            content_hash: identifies the train split.
            cache: where a trained tokenizer is looked for and kept.

        Raises:
            TorchstoneError: it cannot be read.
        """
        raise NotImplementedError


__getattr__ = lazy_parts(__name__)
