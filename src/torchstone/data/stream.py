"""`Stream`: ids to text as they come, whole characters only."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchstone.data.tokenizer import Tokenizer

__all__ = ["Stream"]


class Stream:
    """Decodes ids as they come, and holds back what is not yet complete UTF-8."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # Other decoders look at neighbours: they see the ids of the last text shown again, before the new ones.
        self._before: list[int] = []
        self._new: list[int] = []

    def add(self, token: int) -> str:
        """The text that this id completes; empty while a character is split between tokens."""
        token = int(token)
        if self._tokenizer._byte_level:
            known = self._tokenizer._token_bytes
            return self._decoder.decode(known[token] if token < len(known) else b"")
        self._new.append(token)
        text = self._fresh()
        if text.endswith("\ufffd"):
            return ""
        if text:
            self._before, self._new = self._new, []
        return text

    def _fresh(self) -> str:
        shown = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._new)[len(shown) :]

    def end(self) -> str:
        """What was held back, with U+FFFD for an incomplete character."""
        if self._tokenizer._byte_level:
            return self._decoder.decode(b"", final=True)
        text, self._before, self._new = self._fresh(), [], []
        return text
