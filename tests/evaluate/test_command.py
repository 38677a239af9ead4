"""``torchstone evaluate``: what it prints and writes, and one sentence for every mistake."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
import torchstone
from torchstone.errors import TorchstoneError
from torchstone.evaluate import Scorer, perplexity, read_documents
from torchstone.evaluate.progress import Progress
from torchstone.model.site import initialise
from torchstone.train.run import RunFolder, build_model, config_of

Cli = Callable[..., Any]

QUESTION = {"prompt": "abc", "choices": ["d", "ef"], "answer": 0}
PAIR = {"sentence_good": "ab", "sentence_bad": "ba"}


def turned(run: Path, folder: Path, **model: Any) -> Path:
    """A run of another model with random weights, in `folder`."""
    shutil.copytree(run, folder)
    made = RunFolder(folder)
    recipe = made.recipe.override({"model": model})
    net = initialise(build_model(recipe.model, 0), 0)
    save_file({name: value.detach() for name, value in net.state_dict().items()}, folder / "model.safetensors")
    (folder / "recipe.yaml").write_text(recipe.yaml())
    (folder / "config.json").write_text(json.dumps(config_of(recipe.model, made.tokenizer())))
    return folder


@pytest.fixture
def classes(run: Path, tmp_path: Path) -> Path:
    return turned(run, tmp_path / "classes", causal=False, head={"kind": "classification", "classes": 3})


# --------------------------------------------------------------------------------------------- what it prints


def test_json_is_one_document_and_out_the_same(cli: Cli, run: Path, jsonl: Callable[..., str], tmp_path: Path) -> None:
    text = tiny.text(tmp_path / "words.txt", seed=3, lines=3)
    command = ("evaluate", run, "--text", text, "--multiple-choice", jsonl(QUESTION, QUESTION),
               "--minimal-pairs", jsonl(PAIR), "--device", "cpu", "--json",
               "--out", tmp_path / "report.json")  # fmt: skip
    said = cli(*command)
    assert said.status == 0, said.err
    found = json.loads(said.out)
    assert found == json.loads((tmp_path / "report.json").read_text())
    assert [result["task"] for result in found["results"]] == ["text", "multiple_choice", "minimal_pairs"]
    bits = found["results"][0]["metrics"]["bits_per_byte"]
    assert found["confidence"] == 0.95 and 0 < bits["low"] < bits["value"] < bits["high"]
    assert found["results"][1]["questions"] == 2 and found["results"][2]["pairs"] == 1


def test_people_get_lines_with_intervals(cli: Cli, run: Path, jsonl: Callable[..., str]) -> None:
    said = cli("evaluate", run, "--minimal-pairs", jsonl({**PAIR, "UID": "order"}), "--device", "cpu")
    assert said.status == 0 and said.err == ""
    first, metric, group = said.out.splitlines()
    assert first.startswith("minimal_pairs ") and "pairs 1" in first
    assert metric.split()[0] == "accuracy" and " to " in metric and group.split()[0] == "UID=order"


def test_the_run_in_python_gives_what_the_command_prints(cli: Cli, run: Path, tmp_path: Path) -> None:
    text = tiny.text(tmp_path / "words.txt", seed=3, lines=3)
    (result,) = torchstone.load(run).evaluate(text=text, window=8, stride=2, batch=3)
    options = ("--window", "8", "--stride", "2", "--device", "cpu", "--json")
    assert json.loads(cli("evaluate", run, "--text", text, *options).out)["results"] == [result.dump()]
    scorer = Scorer.of_run(RunFolder(run))
    assert result.facts["tokens"] == len(text.read_bytes()) and scorer.sizes(None, None) == (16, 8)


def test_text_is_a_file_a_folder_a_glob_records_or_standard_input(
    cli: Cli, run: Path, jsonl: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(["one text", "another", ""]):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    sources = [tmp_path / "texts", f"{tmp_path}/texts/*.txt", jsonl({"text": "one text"}, {"text": "another"})]
    found = torchstone.load(run).evaluate(text=sources)
    assert [result.facts["documents"] for result in found] == [2, 2, 2]
    assert found[0].metrics == found[1].metrics == found[2].metrics
    (first,) = torchstone.load(run).evaluate(text=sources[0], limit=1)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one text")))
    said = cli("evaluate", run, "--text", "-", "--device", "cpu", "--json")
    (result,) = json.loads(said.out)["results"]
    assert result["metrics"] == first.dump()["metrics"] and result["documents"] == 1


def test_a_masked_run_is_scored_from_both_sides(masked_run: Path, jsonl: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a text of thirty characters, yes")
    text, pairs, choices = torchstone.load(masked_run).evaluate(
        text=tmp_path / "text.txt", minimal_pairs=jsonl(PAIR), multiple_choice=jsonl(QUESTION)
    )
    assert set(text.metrics) == {"pseudo_perplexity", "pseudo_bits_per_byte"}
    assert pairs["accuracy"].value in (0, 0.5, 1) and choices["accuracy"].value in (0, 1)


def test_bf16_is_near_fp32(run: Path, tmp_path: Path) -> None:
    text = tiny.text(tmp_path / "words.txt", seed=3, lines=3)
    exact, rough = (torchstone.load(run).evaluate(text=text, precision=p)[0] for p in ("fp32", "bf16"))
    a, b = exact["bits_per_byte"].value, rough["bits_per_byte"].value
    assert a != b and a == pytest.approx(b, rel=0.02)


def test_labels_are_numbers_or_names_of_the_config(classes: Path, jsonl: Callable[..., str]) -> None:
    texts = ["abc", "b", "hgfe"]
    run = torchstone.load(classes)
    numbers = []
    for text in texts:
        hits = [
            run.evaluate(classification=jsonl({"text": text, "label": label}))[0]["accuracy"].value
            for label in range(3)
        ]
        assert sorted(hits) == [0, 0, 1]
        numbers.append(hits.index(1))
    config = json.loads((classes / "config.json").read_text())
    (classes / "config.json").write_text(json.dumps({**config, "id2label": {"0": "x", "1": "y", "2": "z"}}))
    named = [{"text": text, "label": "xyz"[number]} for text, number in zip(texts, numbers, strict=True)]
    (result,) = torchstone.load(classes).evaluate(classification=jsonl(*named))
    assert result["accuracy"].value == 1 and result.facts["examples"] == 3


def test_a_long_evaluation_says_how_far_it_is(gpt2: Any, letters: Any, capsys: pytest.CaptureFixture[str]) -> None:
    scorer = Scorer(gpt2.ours, letters, batch=2, progress=Progress(every=0))
    perplexity(scorer, [torchstone.data.Document("x", "x" * 40)], "words")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.splitlines()[-1] == "words: 6 sequences"


# ------------------------------------------------------------------------------------------------ bad input


@pytest.fixture
def refused(cli: Cli, tmp_path: Path, run: Path) -> Callable[..., str]:
    """``refused(options...)``: one line on stderr, status 2, nothing printed, nothing changed; gives the line."""

    def check(*options: Any, of: Path = run) -> str:
        before = tiny.listing(tmp_path)
        said = cli("evaluate", of, "--device", "cpu", *options, "--out", tmp_path / "report.json")
        assert said.status == 2 and said.out == "" and said.err.count("\n") == 1, said.err
        assert tiny.listing(tmp_path) == before
        return said.err

    return check


def test_nothing_to_do_and_sizes_that_make_no_sense(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "nothing to do; give text, multiple-choice" in refused()
    text = ("--text", tiny.text(tmp_path / "words.txt"))
    assert "window is 0, 1 or more is needed" in refused(*text, "--window", "0")
    assert "stride is 9, with this window 1 to 8" in refused(*text, "--window", "8", "--stride", "9")
    assert "stride is 0" in refused(*text, "--stride", "0")
    assert "limit is 0, 1 or more is needed" in refused(*text, "--limit", "0")
    assert "batch is 0, 1 or more is needed" in refused(*text, "--batch", "0")
    assert "precision is one of fp32, bf16, not 'fp8'" in refused(*text, "--precision", "fp8")
    assert "no device 'tpu9'; allowed: auto, cpu" in refused(*text, "--device", "tpu9")
    assert "include-path is for tasks" in refused(*text, "--include-path", tmp_path)


def test_a_report_that_cannot_be_written(cli: Cli, run: Path, jsonl: Callable[..., str], tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "none" / "report.json"):
        said = cli("evaluate", run, "--minimal-pairs", jsonl(PAIR), "--out", out)
        assert said.status == 2 and said.out == "" and "a file in a folder that exists is needed" in said.err


def test_texts_that_are_missing_empty_short_or_no_text(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no such file or folder" in refused("--text", tmp_path / "none.txt")
    assert "no file matches" in refused("--text", f"{tmp_path}/*.none")
    (tmp_path / "empty.txt").touch()
    assert "holds no text" in refused("--text", tmp_path / "empty.txt")
    (tmp_path / "short.txt").write_text("a")
    assert "1 tokens to score, two or more are needed" in refused("--text", tmp_path / "short.txt")
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    assert "not UTF-8: byte 0xff at offset 2" in refused("--text", tmp_path / "bad.txt")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert "standard input is not UTF-8: byte 0xff at offset 2" in refused("--text", "-")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "'-': holds no text" in refused("--text", "-")


OPTIONS = ("--multiple-choice", "--classification", "--minimal-pairs")


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON (Expecting property name"),
        ("[1]", "line 2: a JSON object is needed, not list"),
        ("[" * 100_000, "line 2: not JSON that can be read here"),
    ],
)
def test_a_line_that_is_no_record(
    refused: Callable[..., str], jsonl: Callable[..., str], option: str, line: str, message: str
) -> None:
    good = {**QUESTION, **PAIR, "text": "a", "label": 0}
    assert message in refused(option, jsonl(good, line))


@pytest.mark.parametrize("option", OPTIONS)
def test_a_file_of_records_that_is_missing_or_empty(
    refused: Callable[..., str], jsonl: Callable[..., str], tmp_path: Path, option: str
) -> None:
    assert "cannot read" in refused(option, tmp_path / "none.jsonl")
    assert "cannot read" in refused(option, tmp_path)
    assert "holds no record" in refused(option, jsonl())
    (tmp_path / "bytes.jsonl").write_bytes(b'{"text": "\xff"}\n')
    assert "line 1: not UTF-8 (byte 0xff)" in refused(option, tmp_path / "bytes.jsonl")


RECORDS: list[tuple[str, dict[str, Any], str]] = [
    ("--multiple-choice", {"prompt": None}, "field 'prompt' is NoneType, a string is needed"),
    ("--multiple-choice", {"choices": ["a"]}, "needs a list of two or more strings, found 1"),
    ("--multiple-choice", {"choices": "ab"}, "needs a list of two or more strings, found str"),
    ("--multiple-choice", {"choices": ["a", 1]}, "choice 1 is int, a string is needed"),
    ("--multiple-choice", {"choices": ["a", ""]}, "choice 1 is empty; every choice needs text"),
    ("--multiple-choice", {"answer": 2}, "answer 2 is out of range; choices are 0 to 1"),
    ("--multiple-choice", {"answer": -1}, "answer -1 is out of range"),
    ("--multiple-choice", {"answer": True}, "answer is bool, an index or a choice is needed"),
    ("--multiple-choice", {"answer": "e"}, "answer 'e' is none of the choices (did you mean 'ef'?)"),
    ("--classification", {"label": 1.5}, "label is float, a number or a name is needed"),
    ("--minimal-pairs", {"sentence_bad": ""}, "field 'sentence_bad' is empty"),
]


@pytest.mark.parametrize(("option", "change", "message"), RECORDS)
def test_a_field_that_is_wrong(
    refused: Callable[..., str], jsonl: Callable[..., str], option: str, change: dict[str, Any], message: str
) -> None:
    good = {**QUESTION, **PAIR, "text": "a", "label": 0}
    line = refused(option, jsonl(good, {**good, **change}))
    assert message in line and "line 2: " in line


@pytest.mark.parametrize(
    ("option", "field", "message"),
    [
        ("--multiple-choice", "prompt", "no field 'prompt' or 'question'"),
        ("--multiple-choice", "choices", "no field 'choices'; fields: prompt, answer"),
        ("--multiple-choice", "answer", "no field 'answer'"),
        ("--classification", "label", "no field 'label'; fields: text"),
        ("--minimal-pairs", "sentence_bad", "no field 'sentence_bad' (did you mean 'sentence_good'?)"),
    ],
)
def test_a_field_that_is_missing(
    refused: Callable[..., str], jsonl: Callable[..., str], option: str, field: str, message: str
) -> None:
    records = {"--multiple-choice": QUESTION, "--classification": {"text": "a", "label": 0}, "--minimal-pairs": PAIR}
    record = {name: value for name, value in records[option].items() if name != field}
    assert message in refused(option, jsonl(record))


def test_a_model_that_a_task_makes_no_sense_for(
    refused: Callable[..., str], jsonl: Callable[..., str], run: Path, classes: Path, tmp_path: Path
) -> None:
    labels = jsonl({"text": "a", "label": 0})
    assert "classification needs a head of that kind, the model's is lm" in refused("--classification", labels)
    for task in (("--text", labels), ("--minimal-pairs", jsonl(PAIR)), ("--multiple-choice", jsonl(QUESTION))):
        assert "classification gives no logits over the vocabulary" in refused(*task, of=classes)
    for label, message in ((3, "label 3 is out of range; classes are 0 to 2"), ("x", "config.json names none")):
        assert message in refused("--classification", jsonl({"text": "a", "label": label}), of=classes)
    both = turned(run, tmp_path / "both", encoder={"depth": 1})
    assert "encoder-decoder has no perplexity" in refused("--text", labels, of=both)
    assert "encoder-decoder has no perplexity" in refused("--minimal-pairs", jsonl(PAIR), of=both)


def test_a_choice_beyond_the_model_s_positions(
    refused: Callable[..., str], jsonl: Callable[..., str], run: Path, tmp_path: Path
) -> None:
    short = turned(run, tmp_path / "short", position={"kind": "learned"})
    text = ("--text", tiny.text(tmp_path / "words.txt"))
    assert "window is 17, the model knows 16 positions" in refused(*text, "--window", "17", of=short)
    long = jsonl({**QUESTION, "choices": ["a", "b" * 17]})
    line = refused("--multiple-choice", long, of=short)
    assert "line 1: 17 tokens to score, the model knows 16 positions" in line


def test_weights_that_are_not_finite(
    refused: Callable[..., str], jsonl: Callable[..., str], run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "broken")
    path = tmp_path / "broken" / "model.safetensors"
    save_file({name: torch.full_like(x, torch.nan) for name, x in load_file(path).items()}, path)
    assert "numbers that are not finite" in refused("--minimal-pairs", jsonl(PAIR), of=tmp_path / "broken")


def test_the_harness_is_an_extra(
    refused: Callable[..., str], run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "no such run" in refused("--tasks", "copa", of=tmp_path / "none")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'torchstone[eval]'" in refused("--tasks", "copa")


def test_a_masked_model_without_a_mask_token(bert: Any, letters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(letters.__dict__, "mask", None)
    scorer = Scorer(bert.ours, letters)
    with pytest.raises(TorchstoneError, match="needs a mask token"):
        perplexity(scorer, [torchstone.data.Document("x", "abc")])


def test_documents_are_read_as_they_are_needed(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_bytes(b"\xff" if number == 2 else b"text")
    documents = read_documents(str(tmp_path))
    assert [next(documents).text for _ in range(2)] == ["text", "text"]
    with pytest.raises(TorchstoneError, match="not UTF-8"):
        next(documents)
