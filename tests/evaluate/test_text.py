"""Perplexity by a sliding window, token by token against other code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchstone.data import Document, Tokenizer
from torchstone.evaluate import Scorer, perplexity
from torchstone.evaluate.intervals import ratio
from torchstone.evaluate.scoring import Job

TEXTS = ["The cab sat on the mat.", "a", "Größe, naïve café 漢字!", "0123456789" * 4]


def documents(*texts: str) -> list[Document]:
    return [Document(str(number), text) for number, text in enumerate(texts)]


@torch.no_grad()
def left_to_right(theirs: Any, ids: Sequence[int], window: int, stride: int) -> list[float]:
    """Nats of each token but the first, each from a forward of its own over the context that it is due."""
    out = []
    for t in range(1, len(ids)):
        block = max(0, math.ceil((t - window) / stride))
        end = min(len(ids) - 1, window + block * stride)
        context = ids[max(0, end - window) : t]
        logits = theirs(torch.tensor([context])).logits[0, -1].double()
        out.append(-logits.log_softmax(-1)[ids[t]].item())
    return out


@torch.no_grad()
def one_hidden(theirs: Any, row: Sequence[int], at: int, mask: int) -> float:
    hidden = [*row[:at], mask, *row[at + 1 :]]
    return -theirs(torch.tensor([hidden])).logits[0, at].double().log_softmax(-1)[row[at]].item()


@pytest.mark.parametrize(("window", "stride"), [(None, None), (12, 12), (12, 1), (7, 3), (1, 1)])
def test_a_sliding_window_is_the_plain_loop(
    gpt2: Any, letters: Tokenizer, window: int | None, stride: int | None
) -> None:
    found = perplexity(Scorer(gpt2.ours, letters), documents(*TEXTS), "texts", window, stride)
    size, step = window or 12, stride or 6
    nats = [left_to_right(gpt2.theirs, [letters.separator, *text.encode()], size, step) for text in TEXTS]
    sizes = [len(text.encode()) for text in TEXTS]
    a_token = a_byte = ratio([sum(x) for x in nats], sizes)
    assert found.facts["tokens"] == found.facts["bytes"] == sum(sizes)  # tokens are bytes here
    assert (found.facts["window"], found.facts["stride"], found.facts["unit"]) == (size, step, "document")
    for name in ("value", "low", "high"):
        wanted = getattr(a_token, name)
        assert math.isclose(getattr(found["perplexity"], name), math.exp(wanted), rel_tol=1e-4)
        wanted = getattr(a_byte, name) / math.log(2)
        assert math.isclose(getattr(found["bits_per_byte"], name), wanted, rel_tol=1e-5)


def test_bytes_are_counted_in_the_text_and_not_in_tokens(gpt2: Any, merging: Tokenizer) -> None:
    text = "the cab sat on the mat, é"
    found = perplexity(Scorer(gpt2.ours, merging), documents(text, text))
    ids = merging.encode(text)
    assert len(ids) < len(text.encode())
    nats = sum(left_to_right(gpt2.theirs, [merging.separator, *ids], 12, 6))
    assert math.isclose(found["bits_per_byte"].value, nats / math.log(2) / len(text.encode()), rel_tol=1e-5)
    assert math.isclose(found["perplexity"].value, math.exp(nats / len(ids)), rel_tol=1e-4)


def test_documents_do_not_see_each_other(gpt2: Any, letters: Tokenizer) -> None:
    scorer = Scorer(gpt2.ours, letters)
    together = perplexity(scorer, documents(*TEXTS))["bits_per_byte"].value
    turned = perplexity(scorer, documents(*TEXTS[::-1]))["bits_per_byte"].value
    alone = [perplexity(scorer, documents(text, text))["bits_per_byte"].value * len(text.encode()) for text in TEXTS]
    assert math.isclose(together, turned, rel_tol=1e-6)
    assert math.isclose(together, sum(alone) / sum(len(text.encode()) for text in TEXTS), rel_tol=1e-6)


def test_of_one_document_the_window_is_the_unit(gpt2: Any, letters: Tokenizer) -> None:
    found = perplexity(Scorer(gpt2.ours, letters), documents(TEXTS[3]))
    nats = left_to_right(gpt2.theirs, [letters.separator, *TEXTS[3].encode()], 12, 6)
    cuts = [0, 12, 18, 24, 30, 36, 40]
    parts = list(pairwise(cuts))
    wanted = ratio([sum(nats[a:b]) for a, b in parts], [b - a for a, b in parts])
    assert found.facts["unit"] == "window" and found.facts["windows"] == len(parts)
    assert math.isclose(found["perplexity"].high, math.exp(wanted.high), rel_tol=1e-4)
    assert math.isclose(found["bits_per_byte"].low, max(0, wanted.low) / math.log(2), rel_tol=1e-4, abs_tol=1e-9)
    short = perplexity(Scorer(gpt2.ours, letters), documents("short"))
    assert short.facts["windows"] == 1 and short["perplexity"].low is None


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_batch_changes_nothing(request: pytest.FixtureRequest, letters: Tokenizer, name: str) -> None:
    model = request.getfixturevalue(name).ours
    one, seven = (perplexity(Scorer(model, letters, batch=batch), documents(*TEXTS)) for batch in (1, 7))
    assert one.facts == seven.facts
    for metric in one.metrics:
        for end in ("value", "low", "high"):
            assert math.isclose(getattr(one[metric], end), getattr(seven[metric], end), rel_tol=1e-5)


def test_a_pseudo_log_likelihood_hides_one_token_at_a_time(bert: Any, framed: Tokenizer) -> None:
    texts = ["The cab.", "a mat", "naïve"]
    found = perplexity(Scorer(bert.ours, framed), documents(*texts))
    nats = []
    for text in texts:
        row = framed.encode_input(text)
        assert len(row) == len(text.encode()) + 2  # [CLS] and [SEP] are read and not scored
        nats.append(sum(one_hidden(bert.theirs, row, at, framed.mask) for at in range(1, len(row) - 1)))
    wanted = ratio(nats, [len(text.encode()) for text in texts])
    assert set(found.metrics) == {"pseudo_perplexity", "pseudo_bits_per_byte"}
    assert math.isclose(found["pseudo_perplexity"].value, math.exp(wanted.value), rel_tol=1e-4)
    assert math.isclose(found["pseudo_bits_per_byte"].high, wanted.high / math.log(2), rel_tol=1e-4)


def test_a_long_text_is_hidden_token_by_token_in_the_window_where_it_lies_deepest(bert: Any, framed: Tokenizer) -> None:
    text = "0123456789abcdefghijABCDE"  # 25 tokens, 12 of them in a window, windows at 0, 4, 8, 12, 13
    found = perplexity(Scorer(bert.ours, framed), documents(text), window=14, stride=4)
    cls, *ids, sep = framed.encode_input(text)
    starts, nats = [0, 4, 8, 12, 13], 0.0
    for i in range(len(ids)):
        start = max((s for s in starts if s <= i < s + 12), key=lambda s: (min(i - s, s + 11 - i), s))
        row = [cls, *ids[start : start + 12], sep]
        nats += one_hidden(bert.theirs, row, 1 + i - start, framed.mask)
    assert found.facts["windows"] == 5
    assert math.isclose(found["pseudo_bits_per_byte"].value, nats / math.log(2) / 25, rel_tol=1e-4)


def test_without_a_template_the_separator_stands_before_a_document(bert: Any, letters: Tokenizer) -> None:
    scorer = Scorer(bert.ours, letters)
    assert scorer.frame == ([letters.separator], [])
    found = perplexity(scorer, documents("abc", "abc"))
    row = [letters.separator, *b"abc"]
    nats = sum(one_hidden(bert.theirs, row, at, letters.mask) for at in (1, 2, 3))
    assert math.isclose(found["pseudo_bits_per_byte"].value, nats / math.log(2) / 3, rel_tol=1e-4)


def scored(windows: list[list[Job]]) -> list[int]:
    return [target for window in windows for job in window for target in job.targets]


@settings(deadline=None, max_examples=60)
@given(length=st.integers(1, 60), window=st.integers(2, 12), data=st.data())
def test_every_token_is_scored_once_with_the_context_that_the_window_allows(
    gpt2: Any, letters: Tokenizer, length: int, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window))
    text = bytes(33 + i % 90 for i in range(length)).decode()
    windows = list(Scorer(gpt2.ours, letters).windows(text, window, stride))
    assert scored(windows) == list(text.encode())
    seen = 0
    for number, (job,) in enumerate(windows):
        assert len(job.ids) <= window
        for at, target in zip(job.at, job.targets, strict=True):
            seen += 1
            assert (letters.separator, *text.encode())[seen] == target
            assert at + 1 == seen if number == 0 else at + 1 > window - stride
    masked = list(Scorer(gpt2.ours, letters, masked=True).windows(text, window, min(stride, window - 1)))
    assert scored(masked) == list(text.encode())
    for job in (job for some in masked for job in some):
        assert len(job.ids) <= window and job.ids[job.at[0]] == letters.mask
