"""Byte-level BPE trained on the train split (Sennrich et al. 2016, arXiv:1508.07909; on bytes as in GPT-2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from torchstone.data.tokenizers import TokenizerSpec

if TYPE_CHECKING:
    from torchstone.data.store import Cache
    from torchstone.data.tokenizer import Tokenizer

__all__ = ["BpeSpec"]

_FORMAT = 1


class BpeSpec(TokenizerSpec):
    """Byte-level byte-pair encoding, trained on the train split only and kept by its content hash.

    Every text can be encoded and comes back byte for byte.
    """

    paper = "Sennrich, Haddow and Birch 2016, arXiv:1508.07909"

    vocabulary: int = Field(4096, ge=259, le=1_000_000)
    """Tokens in all, with 256 bytes and 3 special tokens. A corpus with too few repeated pairs yields fewer."""

    def size(self) -> int:
        return self.vocabulary

    def load(self, documents: Callable[[], Iterator[str]], content_hash: str, cache: Cache) -> Tokenizer:
        from torchstone.data.hashing import digest
        from torchstone.data.tokenizer import SPECIAL, Tokenizer, byte_level

        key = digest(_FORMAT, self.vocabulary, content_hash)
        found = cache.find("tokenizers", key)
        if found is not None:
            return Tokenizer.load(found)
        from tokenizers import pre_tokenizers, trainers

        tokenizer = byte_level(None)
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocabulary,
            min_frequency=2,
            special_tokens=list(SPECIAL.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.backend.train_from_iterator(documents(), trainer)
        tokenizer = Tokenizer(tokenizer.backend, tokenizer.config)  # the vocabulary is there only now
        tokenizer.save(cache.stage("tokenizers", key))
        return tokenizer
