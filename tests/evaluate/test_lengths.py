"""Bits per byte by length, and under which attention; attention resolution."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import torchstone
from torchstone.data import Document, Tokenizer
from torchstone.errors import TorchstoneError
from torchstone.evaluate import Scorer, attention_resolution, bits_by_length, score_curve
from torchstone.model.mask import CAUSAL, Blocks, Mask, Window
from torchstone.model.transformer import Transformer
from torchstone.spec import resolve

TEXTS = ["ä" + "abc def ghi jkl mno" * 2, "short", "0123456789" * 4]


def decoder() -> Transformer:
    fields = {
        "width": 32,
        "depth": 2,
        "vocabulary": 260,
        "attention": {"heads": 2},
        "residual": {"kind": "pre", "std": 0.3},
    }
    return torchstone.build(fields)


@torch.no_grad()
def by_hand(model: Transformer, text: bytes, size: int, last: int, longest: int, mask: Mask) -> tuple[float, int]:
    """Nats of the last `last` tokens of a forward of `size` ending at each multiple of `longest`, and their number."""
    nats, count = 0.0, 0
    for end in range(longest, len(text), longest):
        logits = model(torch.tensor([list(text[end - size : end])]), mask=mask).logits[0].double().log_softmax(-1)
        for n in range(last):
            nats -= logits[size - 1 - n, text[end - n]].item()
            count += 1
    return nats, count


@pytest.mark.parametrize("mask", [CAUSAL, CAUSAL & Blocks(4), CAUSAL & Window(5)], ids=["full", "blocks", "window"])
@pytest.mark.parametrize("last", [None, 3])
def test_bits_of_the_last_tokens_are_those_of_plain_forwards(letters: Tokenizer, mask: Mask, last: int | None) -> None:
    model = decoder()
    documents = [Document(str(number), text) for number, text in enumerate(TEXTS)]
    result = bits_by_length(Scorer(model, letters, attention=mask, batch=3), documents, "t", (16, 8, 8), last)
    assert result.facts == {"documents": 2, "windows": 4, "last": last or 4, "unit": "document"}
    for size in (8, 16):
        parts = [by_hand(model, text.encode(), size, last or 4, 16, mask) for text in (TEXTS[0], TEXTS[2])]
        wanted = sum(nats for nats, _ in parts) / sum(count for _, count in parts) / math.log(2)
        assert result[f"bits_per_byte@{size}"].value == pytest.approx(wanted, rel=1e-5)
        assert result[f"bits_per_byte@{size}"].low is not None


def test_up_to_two_blocks_attention_in_blocks_changes_nothing(letters: Tokenizer) -> None:
    model, documents = decoder(), [Document("x", TEXTS[2])]
    full, blocks = (
        bits_by_length(Scorer(model, letters, attention=mask), documents, "t", (8, 16))
        for mask in (CAUSAL, CAUSAL & Blocks(4))
    )
    assert blocks["bits_per_byte@8"].value == pytest.approx(full["bits_per_byte@8"].value, rel=1e-6)
    assert blocks["bits_per_byte@16"].value != pytest.approx(full["bits_per_byte@16"].value, rel=1e-6)


def test_the_command_prints_one_figure_a_length(cli: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    text = tiny.text(tmp_path / "words.txt", seed=3, lines=9)
    command = ("evaluate", run, "--text", text, "--lengths", "8,16,32", "--device", "cpu", "--json")
    found = {}
    for words in ("full", "blocks:4", "window:8"):
        said = cli(*command, "--attention", words, "--last", "2")
        assert said.status == 0, said.err
        (result,) = json.loads(said.out)["results"]
        assert result["task"] == "lengths" and result["last"] == 2 and result["unit"] == "window"
        found[words] = [result["metrics"][f"bits_per_byte@{size}"]["value"] for size in (8, 16, 32)]
    assert found["full"][0] == pytest.approx(found["blocks:4"][0]) and found["full"][2] != found["blocks:4"][2]
    (plain,) = torchstone.load(run).evaluate(text=text)
    (blocks,) = torchstone.load(run).evaluate(text=text, attention="blocks:2")
    assert plain["bits_per_byte"].value != blocks["bits_per_byte"].value


def test_the_command_writes_under_an_attention(cli: Callable[..., Any], run: Path) -> None:
    command = ("generate", run, "--prompt", "abc def ghi", "--max-new-tokens", "9", "--temperature", "0", "--json")
    texts = {}
    for words in ("full", "window:500", "blocks:2"):
        said = cli(*command, "--device", "cpu", "--attention", words)
        assert said.status == 0, said.err
        texts[words] = json.loads(said.out)[0]["ids"]
    assert texts["full"] == texts["window:500"] and len(texts["blocks:2"]) == 9
    said = cli(*command, "--attention", "blocks")
    assert said.status == 2 and "attention: is full, window:SIZE or blocks:SIZE" in said.err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--lengths", "8"), "lengths are for text, and none is given"),
        (("--text", "TEXT", "--last", "2"), "last is for lengths, and none are given"),
        (("--text", "TEXT", "--lengths", "8", "--window", "8"), "window and stride slide over a text"),
        (("--text", "TEXT", "--lengths", "8,x"), "--lengths: needs whole numbers above zero, as in 128,256; got '8,x'"),
        (("--text", "TEXT", "--lengths", "1,8"), "lengths are tokens, 2 or more, not 1, 8"),
        (("--text", "TEXT", "--lengths", "8", "--last", "9"), "last is 9, with these lengths 1 to 8 is possible"),
        (("--text", "TEXT", "--lengths", "100000"), "no document is longer than 100000 tokens"),
        (("--text", "TEXT", "--attention", "ring:8"), "attention: is full, window:SIZE or blocks:SIZE"),
    ],
)
def test_options_that_make_no_sense(
    cli: Callable[..., Any], run: Path, tmp_path: Path, options: tuple[str, ...], sentence: str
) -> None:
    text = str(tiny.text(tmp_path / "words.txt", lines=3))
    with_pair = () if "--text" in options else ("--minimal-pairs", text)
    said = cli("evaluate", run, *[text if word == "TEXT" else word for word in options], *with_pair, "--device", "cpu")
    assert said.status == 2 and sentence in said.err and said.out == ""


def test_models_that_read_both_ways_have_neither(bert: Any, letters: Tokenizer) -> None:
    with pytest.raises(TorchstoneError, match="attention is for models that read from left to right"):
        Scorer(bert.ours, letters, attention=CAUSAL & Blocks(4))
    with pytest.raises(TorchstoneError, match="lengths are for decoders"):
        bits_by_length(Scorer(bert.ours, letters), [Document("x", "abc")], "t", (2,))


# ------------------------------------------------------------------------------------------------ attention resolution


def test_a_constant_curve_has_no_resolution_and_a_falling_one_has() -> None:
    assert attention_resolution(torch.full((9,), 3.0)) == 0
    falling = torch.randn(4, 50, dtype=torch.float64).abs().cumsum(-1).flip(-1)
    assert (attention_resolution(falling) > 0).all() and (attention_resolution(falling.flip(-1)) < 0).all()
    torch.testing.assert_close(attention_resolution(falling + 700), attention_resolution(falling))
    with pytest.raises(TorchstoneError, match="needs two distances"):
        attention_resolution(torch.ones(3, 1))


def test_resolution_is_the_paper_s_sum() -> None:
    s = [0.3, 1.0, -0.5, 0.1]
    e = [math.exp(x) for x in s]
    wanted = sum(e[i] * (e[i] - e[i + 1]) for i in range(3)) / sum(e) ** 2
    assert attention_resolution(torch.tensor(s)).item() == pytest.approx(wanted, rel=1e-6)


def test_curves_are_those_of_the_position() -> None:
    def curve(kind: str, **fields: Any) -> torch.Tensor:
        return score_curve(resolve("position", kind)(**fields).build(16, 2, 32, 64, True), 2, 16, 40)

    i, distance = torch.arange(8), torch.arange(41)[:, None]
    turned, zeta = torch.cos(distance * 10000.0 ** (-i / 8)), (i / 8 + 0.4) / 1.4
    torch.testing.assert_close(curve("rotary")[0], turned.sum(-1) / 2, rtol=0, atol=1e-4)
    torch.testing.assert_close(curve("xpos", scale_base=16)[1], (zeta ** (distance / 16) * turned).sum(-1) / 2,
                               rtol=0, atol=1e-4)  # fmt: skip
    torch.testing.assert_close(curve("alibi")[0], 4 - torch.arange(41.0) / 16)
    assert (curve("none") == 4).all()
    resolution = {kind: attention_resolution(curve(kind)).mean() for kind in ("none", "rotary", "xpos", "alibi")}
    assert resolution["none"] == 0 and resolution["alibi"] > 0
