"""The probe of frequencies: chance where there is nothing, one where there is; the same as a naive fit; the verb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tiny
from torchstone.errors import TorchstoneError
from torchstone.interop.exporting import export_run
from torchstone.interop.importing import import_run
from torchstone.interpret.frequency import _logistic, examine, nearest_popular, probe_accuracy, read_counts
from torchstone.keys import Key
from torchstone.train.run import RunFolder


def test_a_probe_finds_what_is_there_and_nothing_else() -> None:
    generator = Key(0).generator()
    side = (torch.arange(300) % 3 > 0).long()
    plain = torch.randn(300, 8, generator=generator)
    by_chance = [probe_accuracy(torch.randn(300, 8, generator=generator), side, Key(n)) for n in range(20)]
    assert abs(sum(by_chance) / 20 - 0.5) < 0.03
    told = plain.clone()
    told[:, 3] += 8.0 * side
    assert probe_accuracy(told, side, Key(1)) > 0.99
    # words of neither side are never looked at, and neither scale nor place of the table matters
    other = torch.cat([told, torch.full((5, 8), torch.nan)])
    sides = torch.cat([side, torch.full((5,), -1)])
    assert probe_accuracy(5 * other - 3, sides, Key(1)) == probe_accuracy(told, side, Key(1))
    with pytest.raises(TorchstoneError, match="4 words are too few for 5 folds"):
        probe_accuracy(plain[:20], (torch.arange(20) >= 4).long(), Key(0))


def test_the_regression_is_the_least_of_its_balanced_loss() -> None:
    x = torch.cat([torch.ones(40, 1), torch.randn(40, 3, generator=Key(0).generator())], 1).double()
    y = (torch.arange(40) >= 10).double()

    def loss(w: torch.Tensor) -> torch.Tensor:
        each = F.binary_cross_entropy_with_logits(x @ w, y, reduction="none")
        return 0.5 * (each[y == 0].mean() + each[y == 1].mean()) + 0.005 * w[1:].square().sum()

    found = _logistic(x, y, 0.01)
    assert torch.autograd.functional.jacobian(loss, found).abs().max() < 1e-9


def test_nearest_popular_by_a_loop() -> None:
    table, side = torch.randn(30, 6, generator=Key(2).generator()), (torch.arange(30) % 3).clamp(max=1)
    side[7] = -1
    expected = [
        max((p for p in range(30) if side[p] == 0), key=lambda p: float(F.cosine_similarity(table[p], table[r], dim=0)))
        for r in range(30)
        if side[r] == 1
    ]
    assert nearest_popular(table, side).tolist() == expected


def test_the_verb(tmp_path: Path, cli: Any) -> None:
    tiny.saved(tmp_path / "run", tiny.recipe(tmp_path))
    said = cli("interpret", "frequency", tmp_path / "run", "--popular", "12", "--words", "3", "--json")
    assert said.status == 0, said.err
    report = json.loads(said.out)
    assert (report["popular"], len(report["nearest"])) == (12, 3) and 0 <= report["probe_accuracy"] <= 1
    assert report["counted"].startswith(f"the training split of {tmp_path}/corpus.txt: ") and report["tokens"] > 0
    plain = cli("interpret", "frequency", tmp_path / "run").out
    assert "nearest popular" in plain
    assert f"{report['tokens']:,} tokens counted in {report['counted']}" in plain
    said = cli("interpret", "frequency", tmp_path / "run", "--popular", "5000")
    assert said.status and "popular is 5,000" in said.err


def test_a_run_of_the_objective_is_asked_with_its_own_number_of_popular_tokens(tmp_path: Path) -> None:
    run = tiny.saved(tmp_path / "run", tiny.recipe(tmp_path, objective={"kind": "frequency_adversary", "popular": 7}))
    assert examine(run)["popular"] == 7 and examine(run, popular=9)["popular"] == 9
    plain = tiny.saved(tmp_path / "plain", tiny.recipe(tmp_path))
    assert examine(plain)["popular"] == 259 // 5


def imported(folder: Path) -> RunFolder:
    """A run of bytes that was exported and imported."""
    export_run(tiny.saved(folder / "own", tiny.recipe(folder)), folder / "checkpoint", "torchstone")
    return import_run(folder / "checkpoint", folder / "imported")


def test_an_imported_run_is_told_what_to_count(tmp_path: Path, cli: Any) -> None:
    run, asked = imported(tmp_path), ("interpret", "frequency", tmp_path / "imported", "--popular", "12")
    said = cli(*asked)
    assert said.status == 2 and said.out == "" and said.err.count("\n") == 1
    assert "give a corpus (--data) or a file of counts (--counts)" in said.err
    corpus = tmp_path / "corpus.txt"
    text = corpus.read_bytes()
    by_data = json.loads(cli(*asked, "--data", corpus, "--json").out)
    assert (by_data["counted"], by_data["tokens"]) == (str(corpus), len(text))
    shown = {row["rare"]: row["count"] for row in by_data["nearest"]}
    assert shown == {character: text.count(character.encode()) for character in shown} and any(shown.values())
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "one.txt").write_bytes(text), (folder / "two.txt").write_bytes(text)
    assert examine(run, data=str(folder))["tokens"] == 2 * len(text)
    tokens, spelt = run.tokenizer(), {byte: text.count(bytes([byte])) for byte in sorted(set(text))}
    ids, names = tmp_path / "ids.tsv", tmp_path / "names.tsv"
    ids.write_text("".join(f"{byte}\t{count}\n" for byte, count in spelt.items()))
    names.write_text("".join(f"{tokens.backend.id_to_token(byte)}\t{count}\n" for byte, count in spelt.items()))
    for file in (ids, names):
        found = json.loads(cli(*asked, "--counts", file, "--json").out)
        assert found == {**by_data, "counted": str(file)}
    assert f"{len(text):,} tokens counted in {ids}" in cli(*asked, "--counts", ids).out
    # a run of one's own may be asked so too, and what was trained here is counted as before
    assert examine(RunFolder(tmp_path / "own"), popular=12, counts=ids) == {**by_data, "counted": str(ids)}
    (tmp_path / "own" / "tokenizer.json").unlink()
    assert examine(RunFolder(tmp_path / "own"), counts=ids)["nearest"][0]["rare"].isdecimal()


def test_counts_and_corpora_that_are_none_are_one_sentence(tmp_path: Path) -> None:
    run, file = imported(tmp_path), tmp_path / "counts.tsv"
    tokenizer = run.tokenizer()

    def said(match: str, text: str | None = None, **arguments: Any) -> None:
        if text is not None:
            file.write_text(text)
            arguments["counts"] = file
        with pytest.raises(TorchstoneError, match=match) as caught:
            examine(run, **arguments)
        assert "\n" not in str(caught.value)

    said("line 2: a line is a token or an id, a tab and a count", "a\t3\nb 4\n")
    said("line 1: a line is", "\t3\n")
    said("line 1: a line is", "a\t-3\n")
    said("line 1: a line is", "a\t3.5\n")
    said("line 2: 'zzz' is no token of the run", "a\t3\nzzz\t4\n")
    said("line 1: '259' is no id of the run", "259\t3\n")
    said("line 3: 'a' stands twice", "a\t3\n\na\t4\n")
    said("counts no token", "a\t0\n")
    said("counts no token", "")
    said("cannot be read", counts=tmp_path / "nowhere")
    said("not both", "a\t3\n", data="stdlib")
    said("needs data of texts", data="recall")
    said("nowhere", data=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "file.txt").write_text("")
    said("counts no token", data=str(tmp_path / "empty"))
    file.write_text("a\t3\n")
    with pytest.raises(TorchstoneError, match="the run has no tokenizer, so that counts are of ids"):
        read_counts(file, None, 259)
    # digits are tokens where not every line has them, ids where every line has
    file.write_text("a\t3\n7\t2\r\n")
    assert read_counts(file, tokenizer, 259)[[ord("a"), ord("7"), 7]].tolist() == [3, 2, 0]
    file.write_text("7\t2\n")
    assert read_counts(file, tokenizer, 259)[[ord("7"), 7]].tolist() == [0, 2]
