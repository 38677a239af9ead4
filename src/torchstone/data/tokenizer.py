"""`Tokenizer`: text to ids and back, exact to the byte, around a `tokenizers.Tokenizer`.

Every kind is a real ``tokenizer.json``, so a run's folder loads in Hugging Face transformers as it is. Text is data:
``<|endoftext|>`` spelt out in a document is encoded as ordinary text, never as the special token.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from torchstone.data.hashing import digest
from torchstone.data.stream import Stream
from torchstone.errors import TorchstoneError

__all__ = ["BYTE_CHARACTERS", "SPECIAL", "Tokenizer", "byte_level"]

SPECIAL = {"separator": "<|endoftext|>", "mask": "<|mask|>", "pad": "<|pad|>"}
"""The special tokens of our own vocabularies."""
_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]", "<s>", "<bos>", "[CLS]")
_PIECE = 1 << 17
"""Characters that are encoded at once; the library holds some 100 bytes for each token while it works."""
_BOUNDARY = re.compile(r"\n(?=[A-Za-z0-9])")


def _byte_characters() -> list[str]:
    """The printable stand-in of each byte in byte-level vocabularies, as GPT-2 defined it."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(rest)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
_BYTE_OF = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def byte_level(vocabulary: dict[str, int] | None) -> Tokenizer:
    """A byte-level tokenizer without merges: of these tokens and the special ones, or untrained if None."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[] if vocabulary else None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    if vocabulary:
        backend.add_special_tokens(list(SPECIAL.values()))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL["separator"],
        "eos_token": SPECIAL["separator"],
        "mask_token": SPECIAL["mask"],
        "pad_token": SPECIAL["pad"],
        "clean_up_tokenization_spaces": False,
    }
    return Tokenizer(backend, config)


def _parts(node: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The components of a normalizer, pre-tokenizer or decoder, whether one or a sequence."""
    if node is None:
        return []
    return node[inner] if node.get("type") == "Sequence" else [node]


def _check(text: str) -> None:
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        raise TorchstoneError(
            f"the text holds half of a surrogate pair at character {error.start}, which UTF-8 cannot carry"
        ) from None


class Tokenizer:
    """Text to token ids and back.

    Args:
        backend: the `tokenizers.Tokenizer`; truncation and padding are switched off.
        config: the contents of ``tokenizer_config.json``; names the special tokens.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
        self.backend, self.config = backend, config
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # special tokens spelt out in a text are text
        self._json = backend.to_str()
        described = json.loads(self._json)
        before = _parts(described["pre_tokenizer"], "pretokenizers")
        self._byte_level = any(part["type"] == "ByteLevel" for part in _parts(described["decoder"], "decoders"))
        # Cutting a long text before a line that starts with a letter or digit changes no token if the vocabulary is of
        # bytes, no normaliser looks across lines and nothing is put before a text.
        self._cuts = (
            self._byte_level
            and all(part["type"] == "NFC" for part in _parts(described["normalizer"], "normalizers"))
            and not any(part.get("add_prefix_space") for part in before)
            and not any(part["type"] in ("Metaspace", "Prepend") for part in before)
        )
        model = described["model"]
        self._bytes: np.ndarray | None = None
        if self._cuts and model["type"] == "BPE" and not model["merges"] and len(model["vocab"]) == 256:
            self._bytes = np.array([model["vocab"][character] for character in BYTE_CHARACTERS])

    # ------------------------------------------------------------------------------------------------ text and ids

    def _pieces(self, text: str) -> list[str]:
        if not self._cuts or len(text) <= _PIECE:
            return [text]
        pieces, start = [], 0
        while match := _BOUNDARY.search(text, start + _PIECE):
            pieces.append(text[start : match.end()])
            start = match.end()
        return [*pieces, text[start:]]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without special tokens.

        Raises:
            TorchstoneError: a text holds half of a surrogate pair, which is no text in UTF-8.
        """
        for text in texts:
            _check(text)
        if self._bytes is not None:
            return [self._bytes[np.frombuffer(text.encode(), np.uint8)].tolist() for text in texts]
        pieces = [self._pieces(text) for text in texts]
        flat = [piece for some in pieces for piece in some]
        done = iter(self.backend.encode_batch_fast(flat, add_special_tokens=False))
        return [[token for _ in some for token in next(done).ids] for some in pieces]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens. ``decode(encode(text)) == text`` for byte-level vocabularies.

        Raises:
            TorchstoneError: it holds half of a surrogate pair.
        """
        return self.encode_batch([text])[0]

    def encode_input(self, text: str) -> list[int]:
        """The ids of a text as a model expects them in front of it, with the special tokens of the tokenizer's own
        template (Llama's begin-of-text, BERT's [CLS] and [SEP]); our own vocabularies have no template.

        Raises:
            TorchstoneError: it holds half of a surrogate pair.
        """
        _check(text)
        return list(self.backend.encode(text, add_special_tokens=True).ids)

    @cached_property
    def template(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer's own template puts before and after a text; none for ours."""
        inner, framed = self.encode("a"), self.encode_input("a")
        for at in range(len(framed) - len(inner) + 1):
            if framed[at : at + len(inner)] == inner:
                return framed[:at], framed[at + len(inner) :]
        return [], []

    @cached_property
    def front(self) -> list[int]:
        """What a row begins with: the template's tokens, or the separator."""
        return self.template[0] or [self.separator]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are skipped, bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode([int(token) for token in ids], skip_special_tokens=True)

    def stream(self) -> Stream:
        """A decoder that takes one id at a time."""
        return Stream(self)

    # ------------------------------------------------------------------------------------------------- vocabulary

    @cached_property
    def vocabulary(self) -> int:
        """Number of ids: one more than the largest."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def agrees(self, other: Tokenizer) -> bool:
        """Whether each id is the same token there. The other may have more special tokens, and no others."""
        (own, own_all), (theirs, theirs_all) = (
            [each.backend.get_vocab(with_added_tokens=added) for added in (False, True)] for each in (self, other)
        )
        return own == theirs and own_all.items() <= theirs_all.items()

    def _special(self, *names: str) -> int | None:
        """The id of the first of these entries of the configuration that the vocabulary has."""
        for name in names:
            token = self.config.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and (found := self.backend.token_to_id(token)) is not None:
                return found
        return None

    def _known(self, *tokens: str) -> int | None:
        return next((found for token in tokens if (found := self.backend.token_to_id(token)) is not None), None)

    @cached_property
    def separator(self) -> int:
        """Id of the token that stands before each document and ends a generated text.

        Raises:
            TorchstoneError: the tokenizer has none.
        """
        found = self._special("eos_token", "bos_token")
        found = self._known(*_SEPARATORS) if found is None else found
        if found is None:
            raise TorchstoneError(
                "the tokenizer has no token that separates documents: name its eos_token in tokenizer_config.json, "
                f"or have one of {', '.join(_SEPARATORS)}"
            )
        return found

    @cached_property
    def mask(self) -> int | None:
        """Id of the mask token, or None."""
        found = self._special("mask_token")
        return self._known("<|mask|>", "[MASK]", "<mask>") if found is None else found

    @cached_property
    def pad(self) -> int:
        """Id of the padding token; the separator's if there is none (padding is masked anyway)."""
        found = self._special("pad_token")
        found = self._known("<|pad|>", "[PAD]", "<pad>") if found is None else found
        return self.separator if found is None else found

    @cached_property
    def specials(self) -> frozenset[int]:
        """Ids of the special tokens, which `decode` skips."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        """The bytes of each id of a byte-level vocabulary; none for special tokens and gaps."""
        added = self.backend.get_added_tokens_decoder()
        out = [b""] * self.vocabulary
        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            if i in self.specials:
                continue
            if i not in added and all(character in _BYTE_OF for character in token):
                out[i] = bytes(_BYTE_OF[character] for character in token)
            else:
                out[i] = token.encode()
        return out

    def token_bytes(self) -> np.ndarray:
        """int32 (vocabulary,): how many bytes of text each token stands for, special tokens none.

        Raises:
            TorchstoneError: the vocabulary is not byte-level, so tokens have no length of their own.
        """
        if not self._byte_level:
            raise TorchstoneError("bytes per token: the tokenizer's vocabulary is not byte-level")
        return np.array([len(token) for token in self._token_bytes], dtype=np.int32)

    @cached_property
    def hash(self) -> str:
        """Hex digits that identify what `encode` does and which token separates documents."""
        return digest(self._json, self.separator)

    # ---------------------------------------------------------------------------------------------------- files

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``tokenizer.json`` and ``tokenizer_config.json``, which transformers loads as they are."""
        config = dict(self.config)
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        text = json.dumps(config, ensure_ascii=False, indent=2)
        Path(folder, "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        Path(folder, "tokenizer_config.json").write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer of a folder, or of a ``tokenizer.json``.

        Raises:
            TorchstoneError: nothing there, or not a valid tokenizer.
        """
        file = Path(os.path.expanduser(path))
        file = file / "tokenizer.json" if os.path.isdir(file) else file
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise TorchstoneError(
                f"no tokenizer: cannot read {str(file)!r}: {getattr(error, 'strerror', None) or error}"
            ) from None
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises a bare Exception
            raise TorchstoneError(
                f"{str(file)!r} is not a valid tokenizer.json: {' '.join(str(error).split())}"
            ) from None
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            beside = file.parent / name
            if beside.is_file():
                try:
                    config.update(json.loads(beside.read_text(encoding="utf-8")))
                except (OSError, ValueError, TypeError):
                    raise TorchstoneError(f"{str(beside)!r} is not a JSON object") from None
        return cls(backend, config)
