"""Any tokenizer of the `tokenizers` library, from its ``tokenizer.json``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from torchstone.data.tokenizers import TokenizerSpec

if TYPE_CHECKING:
    from torchstone.data.store import Cache
    from torchstone.data.tokenizer import Tokenizer

__all__ = ["FileSpec"]


class FileSpec(TokenizerSpec):
    """A tokenizer.json, or a folder that holds one (a Hugging Face checkpoint, a run).

    ``tokenizer_config.json`` beside it names the end-of-text token that separates documents.
    """

    path: str = Field(min_length=1)
    """The file or the folder."""

    def size(self) -> int:
        from torchstone.data.tokenizer import Tokenizer

        return Tokenizer.load(Path(self.path)).vocabulary

    def load(self, documents: Callable[[], Iterator[str]], content_hash: str, cache: Cache) -> Tokenizer:
        from torchstone.data.tokenizer import Tokenizer

        return Tokenizer.load(Path(self.path))
