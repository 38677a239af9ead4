"""Infilling (Bavarian et al. 2022, arXiv 2207.14255): does a model write what stood between a prefix and a suffix?

Exact match, as in single-line infilling (Guo et al. 2024, arXiv 2401.14196, section 4.2), and edit similarity: one less
the Levenshtein distance over the length of the longer text. Blanks around both texts do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from torchstone.data import Document
from torchstone.data.corpora import document_digest
from torchstone.data.infilling import Mode, arranged
from torchstone.errors import TorchstoneError
from torchstone.evaluate.intervals import ratio, wilson
from torchstone.evaluate.records import read_records
from torchstone.evaluate.result import Result
from torchstone.evaluate.scoring import Scorer
from torchstone.evaluate.text import read_documents
from torchstone.generate import Engine, Sampling
from torchstone.generate.infilling import required_sentinels
from torchstone.generate.pseudo_masked import PseudoMaskedEngine
from torchstone.keys import Key

__all__ = ["Hole", "edit_similarity", "infilling", "read_holes"]


@dataclass(frozen=True)
class Hole:
    """A text in three parts, of which the middle is to be written."""

    prefix: str
    middle: str
    suffix: str


def read_holes(source: str, limit: int | None = None) -> list[Hole]:
    """The records ``{"prefix", "middle", "suffix"}`` of a ``.jsonl`` file; of each text elsewhere, as `read_documents`
    finds them, a line with a letter, drawn by the text.

    Raises:
        TorchstoneError: the source cannot be read, a record is none, no text has such a line.
    """
    if source.endswith(".jsonl"):
        return [Hole(*map(record.text, ("prefix", "middle", "suffix"))) for record in read_records(source, limit)]
    holes = list(islice(_lines(read_documents(source)), limit))
    if not holes:
        raise TorchstoneError(f"{source!r}: holds no line with a letter to leave out")
    return holes


def _lines(documents: Iterable[Document]) -> Iterator[Hole]:
    for document in documents:
        lines = document.text.split("\n")
        places = [number for number, line in enumerate(lines) if any(map(str.isalpha, line))]
        if places:
            draws = Key(0).fold("line", document_digest(document.text.encode(errors="surrogatepass")).hex()).numpy()
            at = places[int(draws.integers(len(places)))]
            before, after = "\n".join([*lines[:at], ""]), "\n".join(["", *lines[at + 1 :]])
            yield Hole(before, lines[at], after)


def edit_similarity(a: str, b: str) -> float:
    """One less the least number of insertions, deletions and replacements over the longer length; 1 for two empty."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        left, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, left + (x != y))
    return 1.0 - row[-1] / (max(len(a), len(b)) or 1)


def infilling(
    scorer: Scorer, holes: Sequence[Hole], source: str = "holes", mode: Mode = "psm", stand_in: int | None = None
) -> Result:
    """Exact matches and edit similarity of what greedy decoding writes into holes.

    A quarter of the model's context is for the middle. The rest is for prefix and suffix, half each and what the other
    leaves; a prefix loses its beginning, a suffix its end, and `cut` counts those holes. A middle of one line ends with
    its line. An encoder of pseudo masks is told how many tokens the middle has.

    Args:
        stand_in: id of the token that stands in for hidden ones in an encoder trained with pseudo masks.

    Raises:
        TorchstoneError: a tokenizer without sentinels, a masked language model without pseudo masks, a model that names
            no context.
    """
    sentinels = None if stand_in is not None else required_sentinels(scorer.tokenizer)
    if stand_in is None and (scorer.masked or scorer.seq2seq):
        raise TorchstoneError("infilling: is asked of a model that reads from left to right, or one of pseudo masks")
    if scorer.window is None:
        raise TorchstoneError("infilling: the model names no context, of which prefix and suffix get their shares")
    start = scorer.frame[0]
    new = max(1, scorer.window // 4)
    # an encoder reads the mask tokens too, a decoder not the last token that it writes
    room = scorer.window + 1 - new - len(start) - (1 if sentinels is None else len(sentinels))
    if room < 0:
        raise TorchstoneError(f"infilling: a context of {scorer.window} tokens has no room for a prefix and a suffix")
    prompts, cut = [], 0
    for hole in holes:
        # no token of text is longer than sixteen characters, but for runs of blanks
        prefix, suffix = scorer.tokenizer.encode_batch([hole.prefix[-16 * room :], hole.suffix[: 16 * room]])
        cut += len(prefix) + len(suffix) > room
        left = min(len(prefix), max(room // 2, room - len(suffix)))
        prefix, suffix = prefix[len(prefix) - left :], suffix[: room - left]
        if sentinels is not None:
            prompts.append([*start, *arranged(sentinels, mode, prefix, suffix)])
        else:
            tokens = max(1, min(new, len(scorer.tokenizer.encode(hole.middle))))
            assert scorer.tokenizer.mask is not None
            prompts.append([*start, *prefix, *[scorer.tokenizer.mask] * tokens, *suffix])
    if stand_in is not None:
        engine: Engine = PseudoMaskedEngine(scorer.model, scorer.tokenizer, stand_in)
    else:
        engine = Engine(scorer.model, scorer.tokenizer, compile="off", start=scorer.start, attention=scorer.attention)
    written = [""] * len(holes)
    for stop in ((), ("\n",)):
        these = [n for n, hole in enumerate(holes) if ("\n" not in hole.middle) == bool(stop)]
        sampling = Sampling(max_new_tokens=new, temperature=0.0, stop=stop)
        for a in range(0, len(these), scorer.batch):
            some = these[a : a + scorer.batch]
            for number, done in zip(some, engine.generate([prompts[n] for n in some], sampling), strict=True):
                written[number] = done.text
            scorer.progress.at(source, a + len(some), len(these))
    scorer.progress.end()
    pairs = [(text.strip(), hole.middle.strip()) for text, hole in zip(written, holes, strict=True)]
    return Result(
        "infilling",
        source,
        {
            "exact": wilson(sum(a == b for a, b in pairs), len(pairs)),
            "edit_similarity": ratio([edit_similarity(*pair) for pair in pairs], [1] * len(pairs)),
        },
        {"holes": len(pairs), "cut": cut, "mode": mode if stand_in is None else "pseudo_masks", "max_new_tokens": new},
    )
