"""Text comes in whole characters, and ends before a stop string wherever tokens are cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generate.small import build
from torchstone.data.tokenizer import Tokenizer
from torchstone.generate import Engine, History, Sampling
from torchstone.generate.text import Writer

TEXTS = ["plain", "naïve café", "日本語 text", "🎈 up 🎉", "e\u0301"]


class Script:
    """A guide that makes the engine write given tokens."""

    def __init__(self, *texts: Sequence[int], prompt: int = 1) -> None:
        self.texts, self.prompt = texts, prompt

    def __call__(self, scores: torch.Tensor, history: History) -> torch.Tensor:
        forced = torch.full_like(scores, -1e9)
        for b, request in enumerate(history.requests):
            text = self.texts[int(request)]
            forced[b, text[min(history.step, len(text) - 1)]] = 0.0
        return forced


def pieces(letters: Tokenizer, text: str, stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    writer, out = Writer(letters, stop), []
    for token in letters.encode(text):
        out.append(writer.add(token))
        if writer.stopped:
            break
    return [*out, writer.end()], writer.stopped


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_make_up_the_text(letters: Tokenizer, text: str) -> None:
    out, _ = pieces(letters, text)
    assert "".join(out) == text
    assert "\ufffd" not in "".join(out)


def test_half_a_character_at_the_end_is_dropped(letters: Tokenizer) -> None:
    writer = Writer(letters)
    tokens = letters.encode("a🎈")[:-1]
    assert "".join(map(writer.add, tokens)) + writer.end() == "a"


@settings(max_examples=300, deadline=None)
@given(text=st.text("abé", max_size=12), stop=st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_is_cut_before_the_stop_string_that_is_complete_first(text: str, stop: list[str]) -> None:
    from torchstone.data.tokenizer import BYTE_CHARACTERS, byte_level

    letters = byte_level({character: i for i, character in enumerate(BYTE_CHARACTERS)})
    out, stopped = pieces(letters, text, stop)
    ends = [next((n for n in range(len(text) + 1) if text[:n].endswith(word)), None) for word in stop]
    if all(end is None for end in ends):
        assert "".join(out) == text and not stopped
    else:
        first = min(end for end in ends if end is not None)
        wanted = min(text[:first].find(word) for word in stop if word in text[:first])
        assert "".join(out) == text[:wanted] and stopped


def test_nothing_is_held_back_that_no_stop_string_can_begin_with(letters: Tokenizer) -> None:
    writer = Writer(letters, ["end."])
    assert [writer.add(token) for token in letters.encode("an eel")] == ["a", "n", " ", "", "e", "el"]


def test_engine_ends_at_stop_string_end_token_and_length(letters: Tokenizer) -> None:
    engine = Engine(build(vocabulary=letters.vocabulary, depth=1), letters, compile="off")
    texts = [letters.encode("one STOP two"), [*letters.encode("né"), letters.separator], letters.encode("x" * 30)]
    sampling = Sampling(temperature=0, max_new_tokens=20, stop=("STOP",))
    done = engine.generate(["a", "b", "c"], sampling, guides=[Script(*texts)])
    assert [(one.text, one.finish) for one in done] == [("one ", "stop"), ("né", "eos"), ("x" * 20, "length")]
    assert done[0].ids == texts[0][: len("one STOP")], "what was sampled stays on record"
    assert done[1].ids == texts[1]


def test_empty_prompt_is_the_separator_alone(letters: Tokenizer) -> None:
    engine = Engine(build(vocabulary=letters.vocabulary, depth=1), letters, compile="off")
    one, other = engine.generate(["", [letters.separator]], Sampling(max_new_tokens=3, temperature=0))  # type: ignore[list-item]
    assert one.prompt_ids == [letters.separator] and one.ids == other.ids


def test_stop_string_that_the_last_token_leaves_open_is_text(letters: Tokenizer) -> None:
    engine = Engine(build(vocabulary=letters.vocabulary, depth=1), letters, compile="off")
    script = Script(letters.encode("abST"))
    done = engine.generate(["a"], Sampling(temperature=0, max_new_tokens=4, stop=("STOP",)), guides=[script])
    assert (done[0].text, done[0].finish) == ("abST", "length")
