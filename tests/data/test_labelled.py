"""Labelled texts: rows and masks, classes in order, splits, tables, few examples a class; bad files by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from torchstone.data.labelled import LabelledDataSpec, PreparedLabelled, read
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.spec import resolve, validate
from torchstone.train import train


def ready(path: Path | str, **fields: Any) -> PreparedLabelled:
    body = {"tokenizer": "bytes", "block": 16, "path": str(path), **fields}
    return validate(LabelledDataSpec, body).prepare()


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [{"text": "abc", "label": "y"}, {"text": "de", "label": "x"}, {"text": "f", "label": "y"}]


def test_rows_are_framed_padded_and_numbered_in_the_order_of_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *ROWS)
    data = ready(path, valid=str(path), test=str(path))
    assert data.classes == ("x", "y") and data.sizes == {"classes": 2} and data.tokenizer is not None
    sep, pad = data.tokenizer.separator, data.tokenizer.pad
    (batch,) = data.valid.evaluation(3)
    assert batch["ids"].tolist() == [[sep, 97, 98, 99, sep], [sep, 100, 101, sep, pad], [sep, 102, sep, pad, pad]]
    assert batch["valid"].sum(1).tolist() == [5, 4, 3] and batch["label"].tolist() == [1, 0, 1]
    assert batch["example"].tolist() == [0, 1, 2] and "segment" not in batch
    # a batch is a function of key and step, an epoch holds every example once
    seen = [data.train.batch(Key(1), step, 1)["example"].item() for step in range(3)]
    assert sorted(seen) == [0, 1, 2]
    assert seen == [data.train.batch(Key(1), step, 1)["example"].item() for step in range(3)]
    halves = [data.train.batch(Key(1), 0, 1, micro, 2)["example"].item() for micro in range(2)]
    assert halves == data.train.batch(Key(1), 0, 2)["example"].tolist()


def test_pairs_have_segments_and_the_longer_text_is_cut(tmp_path: Path) -> None:
    rows = [{"a": "x" * 20, "b": "yz", "label": 3}, {"a": "xx", "b": "y" * 20, "label": 10}]
    path = write(tmp_path / "a.jsonl", *rows)
    data = ready(path, valid=str(path), test=str(path), text="a", second="b", block=10)
    assert data.classes == (3, 10)
    sep = data.tokenizer.separator
    (batch,) = data.test.evaluation(2)
    assert batch["ids"].tolist() == [[sep, *[120] * 5, sep, 121, 122, sep], [sep, 120, 120, sep, *[121] * 5, sep]]
    assert batch["segment"].tolist() == [[0] * 7 + [1] * 3, [0] * 4 + [1] * 6]
    assert data.train.cut == 2 and "6 texts cut at 10 tokens" in data.description


def test_tables_are_read_as_lines_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *ROWS)
    table = tmp_path / "a.tsv"
    table.write_text('index\ttext\tlabel\n0\tabc\ty\n\n1\tde\tx\n2\tf "quoted\ty\n')
    one, other = ready(path, valid=str(path), test=str(path)), ready(table, valid=str(table), test=str(table))
    assert one.classes == other.classes
    assert other.test._rows[2][0].tolist()[1:-1] == list(b'f "quoted')
    table.write_text("text\tlabel\nabc\ty\nde\n")
    with pytest.raises(TorchstoneError, match=r"a.tsv' line 3: 1 columns, the header has 2"):
        ready(table)


GLUE: dict[str, tuple[str, dict[str, Any], list[tuple[str, ...]], tuple[str, ...]]] = {
    "CoLA": (
        'gj04\t1\t\tThe ship sank.\nks08\t0\t*\tThe ship sank it "down.\n',
        {"columns": ["source", "label", "star", "sentence"], "text": "sentence"},
        [("The ship sank.",), ('The ship sank it "down.',)],
        ("0", "1"),
    ),
    "MRPC": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
        '1\t702\t703\tHe said "no.\tHe refused.\r\n0\t21\t22\tRain fell.\tIt was dry.\r\n',
        {"text": "#1 String", "second": "#2 String", "label": "Quality"},
        [('He said "no.', "He refused."), ("Rain fell.", "It was dry.")],
        ("0", "1"),
    ),
    "RTE": (
        "index\tsentence1\tsentence2\tlabel\n"
        "0\tA cat sat.\tA cat flew.\tnot_entailment\n1\tHe ran.\tHe moved.\tentailment\n",
        {"text": "sentence1", "second": "sentence2"},
        [("A cat sat.", "A cat flew."), ("He ran.", "He moved.")],
        ("entailment", "not_entailment"),
    ),
}


@pytest.mark.parametrize("task", GLUE)
def test_tables_of_glue_are_read_as_they_come(tmp_path: Path, task: str) -> None:
    content, fields, texts, classes = GLUE[task]
    table = tmp_path / "train.tsv"
    table.write_bytes(content.encode())
    spec = validate(LabelledDataSpec, {"path": str(table), "tokenizer": "bytes", **fields})
    assert [example.texts for example in read(spec, str(table))] == texts
    data = ready(table, valid=str(table), test=str(table), block=64, **fields)
    assert data.classes == classes and len(data.train) == 2


def test_columns_that_do_not_go_with_the_files_are_one_sentence(tmp_path: Path) -> None:
    table = tmp_path / "a.tsv"
    table.write_text("s\t1\t\tabc\ns\t0\tabc\n")
    for columns, message in (
        (["source", "label", "star", "text"], r"a.tsv' line 2: 3 columns, data.columns names 4"),
        (["source", "label", "star", "other"], r"a.tsv' line 1: no field 'text'; fields: source, label, star, other"),
        (["label", "label", "star", "text"], "columns: 'label' is there twice"),
        ([], "columns"),
    ):
        with pytest.raises(TorchstoneError, match=message):
            ready(table, columns=columns)
    with pytest.raises(TorchstoneError, match=r"columns: .*a\.jsonl is no table \(\.tsv\)"):
        ready(tmp_path / "a.jsonl", columns=["label", "text"])


def test_without_files_of_their_own_valid_and_test_are_shares_by_content(tmp_path: Path) -> None:
    path = tiny.examples(tmp_path / "a.jsonl", 400)
    data = ready(path)
    assert len(data.train) + len(data.valid) + len(data.test) == 400 and len(data.valid) > 5 < len(data.test)
    other = ready(path, test=str(tiny.examples(tmp_path / "b.jsonl", 30, seed=1)))
    assert len(other.test) == 30 and len(other.train) == len(data.train) + len(data.test)


def test_few_examples_of_each_class_are_drawn_by_the_seed(tmp_path: Path) -> None:
    path = tiny.examples(tmp_path / "a.jsonl", 200)
    few = ready(path, per_class=4)
    counts = [int((few.train.labels == c).sum()) for c in range(3)]
    assert counts == [4, 4, 4]
    rows = [[row.tolist() for row, _ in ready(path, per_class=4, seed=seed).train._rows] for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert len(few.valid) == len(ready(path).valid)
    assert few.hash != ready(path).hash


@pytest.mark.slow
def test_a_recipe_learns_the_classes(tmp_path: Path) -> None:
    sections = {"trainer": {"steps": 150, "batch": 8, "save_every": 150}, "evaluate": {"every": 150}}
    done = train(tiny.labelled(tmp_path, optimizer={"lr": 0.02}, **sections), out=tmp_path / "run", quiet=True)
    rows = {name: value for row in done.metrics() for name, value in row.items()}
    assert rows["valid_accuracy"] > 0.6 and rows["test_accuracy"] > 0.6 and rows["accuracy"] > 0.6
    assert "valid_bits_per_byte" not in rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], "line 1: no field 'label'; fields: text"),
        ([{"text": 1, "label": "x"}], "line 1: field 'text' is int, a string is needed"),
        ([{"text": "a", "label": 1.5}], "line 1: field 'label' is float, a string or a whole number is needed"),
        ([{"text": "a", "label": True}], "line 1: field 'label' is bool"),
        (
            [{"text": "a", "label": 1}, {"text": "b", "label": "x"}],
            "some labels are numbers and some are strings, as 'x'",
        ),
        ([{"text": "a", "label": 1}, {"text": "b", "label": 1}], "a.jsonl has 1 classes; two are the least"),
        ([{"text": "\ud800", "label": 1}], "half of a surrogate pair"),
        ([], "has 0 classes"),
    ],
)
def test_a_file_that_is_none_is_one_sentence(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    path = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(TorchstoneError, match=message):
        ready(path)


def test_a_class_that_is_only_tested_is_named(tmp_path: Path) -> None:
    path, test = write(tmp_path / "a.jsonl", *ROWS), write(tmp_path / "b.jsonl", {"text": "q", "label": "z"})
    with pytest.raises(TorchstoneError, match=r"no example of class z to train on in .*a\.jsonl"):
        ready(path, valid=str(path), test=str(test))


def test_a_head_or_data_that_do_not_go_with_labels_are_one_sentence(tmp_path: Path) -> None:
    def refused(**sections: Any) -> str:
        with pytest.raises(TorchstoneError) as caught:
            train({**tiny.labelled(tmp_path), **sections}, out=tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists() and "\n" not in str(caught.value)
        return str(caught.value)

    model = {**tiny.MODEL, "causal": False}
    said = refused(model={**model, "head": {"kind": "classification", "classes": 2}})
    assert said.endswith("the model's logits are (2, 2); set model.head: {kind: classification, classes: 3}")
    assert "the model's logits are (2, " in refused(model={**model, "head": "mlm"})
    said = refused(data=tiny.recipe(tmp_path)["data"])
    assert said == "objective classification: needs data with labels (data: labelled, images)"
    assert resolve("data", "labelled") is LabelledDataSpec
