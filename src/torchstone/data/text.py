"""Packed text: a corpus, a tokenizer and how the stream of documents is cut into blocks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from torchstone.data.corpora import CorpusSpec
from torchstone.data.spec import DataSpec
from torchstone.data.tokenizers import TokenizerSpec
from torchstone.spec import Part, part

if TYPE_CHECKING:
    from torchstone.data.prepare import Prepared

__all__ = ["TextDataSpec"]


class TextDataSpec(DataSpec):
    """Packed text from a corpus, cut into blocks of one length."""

    corpus: Part[CorpusSpec] = part("stdlib", "corpus")
    """Where the text comes from."""
    tokenizer: Part[TokenizerSpec] = part("bpe", "tokenizer")
    """What turns text into token ids."""
    block: int = Field(256, ge=2)
    """Tokens in one training block."""
    separate_documents: bool = True
    """Attention and positions restart at each document of a packed block."""
    cache: str | None = None
    """Folder of the token cache; without it $TORCHSTONE_CACHE, else ~/.cache/torchstone."""

    def cache_folder(self) -> Path:
        """The folder of the token cache, which need not exist yet."""
        return Path(self.cache or os.environ.get("TORCHSTONE_CACHE") or "~/.cache/torchstone").expanduser()

    def prepare(self, progress: Callable[[str], None] | None = None) -> Prepared:
        from torchstone.data.prepare import prepare

        return prepare(self, progress)
