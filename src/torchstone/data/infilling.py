"""Fill in the middle (Bavarian et al. 2022, arXiv 2207.14255), as DeepSeek-Coder was trained (Guo et al. 2024, arXiv
2401.14196, section 3.1.2): before packing, half of the documents are cut at two characters and put into another order.

    PSM    begin prefix hole suffix end middle
    SPM    begin hole suffix end prefix middle

begin, hole and end are sentinel tokens. What a model is asked for is an arrangement without its middle; the separator
ends a middle as it ends a document. The loss is over all tokens. Valid and test stay as they are, so that bits per byte
mean what they mean without. SPM is the PSM of an empty prefix whose middle begins with the prefix (the second variant
of Bavarian et al., appendix D), so nothing stands between prefix and middle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from pydantic import Field

from torchstone.data.prepare import Encoding, Prepared, prepare
from torchstone.data.text import TextDataSpec

if TYPE_CHECKING:
    from torchstone.data.tokenizer import Tokenizer

__all__ = ["InfillingDataSpec", "Mode", "Rearranged", "Sentinels", "arranged", "cut", "sentinels_of", "with_sentinels"]

Mode = Literal["psm", "spm"]

_SENTINELS = (
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),  # what is added where there are none
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
)


class Sentinels(NamedTuple):
    """Ids of the tokens before the prefix, before the suffix and before the middle."""

    begin: int
    hole: int
    end: int


def sentinels_of(tokenizer: Tokenizer) -> Sentinels | None:
    """The sentinels of a vocabulary, None where it has none."""
    for names in _SENTINELS:
        ids = [found for name in names if (found := tokenizer.backend.token_to_id(name)) is not None]
        if len(ids) == len(names):
            return Sentinels(*ids)
    return None


def with_sentinels(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with sentinels: its own, or three more ids. Spelt out in a text they are text."""
    import tokenizers

    from torchstone.data.tokenizer import Tokenizer

    found = sentinels_of(tokenizer)
    names = _SENTINELS[0] if found is None else [tokenizer.backend.id_to_token(token) for token in found]
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens(list(names))
    return Tokenizer(backend, tokenizer.config)


def arranged(
    sentinels: Sentinels, mode: Mode, prefix: Sequence[int], suffix: Sequence[int], middle: Sequence[int] = ()
) -> list[int]:
    """The ids of a document whose middle comes last; without a middle, what a model is asked to go on from."""
    if mode == "spm":
        prefix, middle = (), (*prefix, *middle)
    return [sentinels.begin, *prefix, sentinels.hole, *suffix, sentinels.end, *middle]


def cut(text: str, rate: float) -> tuple[str, ...]:
    """Prefix, middle and suffix of a document with probability `rate`, else the document alone. Both cuts are uniform
    over all places between characters, also those at the ends; draws are a function of the text."""
    from torchstone.data.corpora import document_digest
    from torchstone.keys import Key

    draws = Key(0).fold("infilling", document_digest(text.encode()).hex()).numpy()
    if draws.random() >= rate:
        return (text,)
    low, high = sorted(draws.integers(0, len(text) + 1, 2).tolist())
    return text[:low], text[low:high], text[high:]


class InfillingDataSpec(TextDataSpec):
    """Packed text in which the middle of some documents comes last, between sentinel tokens: fill in the middle.

    A tokenizer that has no sentinels gets three more ids.
    """

    paper: ClassVar[str] = "Bavarian et al. 2022, arXiv 2207.14255"

    rate: float = Field(0.5, ge=0, le=1)
    """Share of the documents of train that are rearranged."""
    mode: Mode = "psm"
    """Order of the parts: prefix, suffix, middle or suffix, prefix, middle."""
    chunk: int | None = Field(None, ge=2)
    """Characters: longer documents are first cut into chunks of that many at most, at line ends where there are any,
    each a document of its own, so that a block holds the whole of it. Without it, documents are rearranged whole."""

    @property
    def vocabulary(self) -> int | None:
        """Number of ids with the sentinels, where it is known before any text is read."""
        size = self.tokenizer.size()
        if size is None or self.tokenizer.kind != "file":
            return None if size is None else size + len(Sentinels._fields)
        from torchstone.data.tokenizer import Tokenizer

        return with_sentinels(Tokenizer.load(getattr(self.tokenizer, "path", ""))).vocabulary

    def encoding(self) -> Encoding:
        """What documents become."""
        return Rearranged(self)

    def prepare(self, progress: Callable[[str], None] | None = None) -> Prepared:
        return prepare(self, progress, self.encoding())


class Rearranged(Encoding):
    """Some documents of train in the order of the spec's mode; all others as they are."""

    def __init__(self, spec: InfillingDataSpec) -> None:
        self.spec = spec
        self.settings = (spec.kind, "1", str(spec.rate), spec.mode, str(spec.chunk))

    def tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
        return with_sentinels(tokenizer)

    def arranged(
        self, sentinels: Sentinels, prefix: Sequence[int], middle: Sequence[int], suffix: Sequence[int]
    ) -> list[int]:
        """The ids of a document that is rearranged."""
        return arranged(sentinels, self.spec.mode, prefix, suffix, middle)

    def documents(self, tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> Iterator[list[list[int]]]:
        sentinels = sentinels_of(tokenizer)
        assert sentinels is not None
        cuts = [
            [cut(chunk, self.spec.rate) for chunk in _chunks(text, self.spec.chunk)] if split == "train" else [(text,)]
            for split, text in texts
        ]
        ids = iter(tokenizer.encode_batch([part for chunks in cuts for parts in chunks for part in parts]))
        for chunks in cuts:
            made = []
            for parts in chunks:
                first, *rest = [next(ids) for _ in parts]
                made.append(self.arranged(sentinels, first, *rest) if rest else first)
            yield made


def _chunks(text: str, size: int | None) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = len(text) if size is None else min(start + size, len(text))
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end
