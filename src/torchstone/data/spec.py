"""`DataSpec`: the `data` section of a recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from torchstone.data.corpora import CorpusSpec
from torchstone.data.tokenizers import TokenizerSpec
from torchstone.spec import Part, Spec, kinds, part

__all__ = ["DataSpec"]


class DataSpec(Spec):
    """What a model is trained on: a corpus, a tokenizer and how the text is cut.

    ``data: ./my_files`` is short for a `text` corpus of that path, ``data: records.jsonl`` for a `jsonl` corpus, and
    ``data: stdlib`` for that corpus (unless a file of that name exists).
    """

    corpus: Part[CorpusSpec] = part("stdlib", "corpus")
    """Where the text comes from."""
    tokenizer: Part[TokenizerSpec] = part("bpe", "tokenizer")
    """What turns text into token ids."""
    block: int = Field(256, ge=2)
    """Tokens in one training block."""
    separate_documents: bool = True
    """Attention and positions restart at each document of a packed block."""
    cache: str | None = Field(None, pattern=r"^[^\x00]+$")
    """Folder of the token cache; without it $TORCHSTONE_CACHE, else ~/.cache/torchstone."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value in kinds("corpus") and not os.path.exists(value):
            return {"corpus": value}
        return {"corpus": {"kind": "jsonl" if value.endswith(".jsonl") else "text", "path": value}}

    def cache_folder(self) -> Path:
        """The folder of the token cache, which need not exist yet."""
        return Path(self.cache or os.environ.get("TORCHSTONE_CACHE") or "~/.cache/torchstone").expanduser()
