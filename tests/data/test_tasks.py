"""Synthetic tasks: answers by solvers that only read, disjoint splits, fixed examples, metrics by hand, refusals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
import torchstone
from distributed import run_ranks
from torchstone.cli import main
from torchstone.data._task import TaskSpec, TaskSplit
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.objectives import causal_lm, tokens_of
from torchstone.recipe import load_recipe
from torchstone.spec import kinds, resolve, validate
from torchstone.train.mesh import Mesh
from torchstone.train.run import RunFolder

ODD: dict[str, dict[str, Any]] = {
    "recall": {"pairs": 5, "queries": 3, "keys": 7, "values": 4},
    "copying": {"length": 5, "symbols": 3},
    "induction": {"length": 9, "symbols": 5},
    "needle": {"length": 11, "fillers": 3, "keys": 4, "values": 5},
    "modular": {"modulus": 11, "share": 0.4, "examples": 30},
    "dyck": {"brackets": 3, "depth": 3, "length": 14},
    "sorting": {"length": 6, "symbols": 5},
    "episodes": {"demonstrations": 5, "questions": 2, "features": 3, "values": 3, "labels": 3},
    "two_sources": {"length": 9, "symbols": 5, "branches": 3},
}
FEW: dict[str, dict[str, Any]] = {
    "recall": {"pairs": 2, "queries": 1, "keys": 3, "values": 2},
    "copying": {"length": 3, "symbols": 4},
    "induction": {"length": 4, "symbols": 4},
    "needle": {"length": 4, "fillers": 2, "keys": 4, "values": 4},
    "modular": {"modulus": 11, "share": 0.4, "examples": 30},
    "dyck": {"brackets": 2, "depth": 3, "length": 6},
    "sorting": {"length": 3, "symbols": 4},
    "episodes": {"demonstrations": 2, "questions": 1, "features": 1, "values": 2},
    "two_sources": {"length": 2, "symbols": 2},
}
"""Tasks of some dozens of different examples."""


def task(kind: str, **fields: Any) -> TaskSpec:
    return validate(resolve("data", kind), fields)  # type: ignore[return-value]


def rows_of(split: TaskSplit, count: int) -> list[tuple[list[int], list[int]]]:
    """Ids and targets of `count` examples."""
    batch = split.batch(Key(1), 0, count)
    return list(zip(batch["ids"].tolist(), batch["next"].tolist(), strict=True))


# ------------------------------------------------------------------------------------------------------------- answers


def solve_recall(spec: Any, read: list[int]) -> int | None:
    held, asked = read[: 2 * spec.pairs], read[2 * spec.pairs :]
    if len(asked) % 2 == 0:  # nothing is asked, or a value stands last
        return None
    return dict(zip(held[::2], held[1::2], strict=True))[asked[-1]]


def solve_copying(spec: Any, read: list[int]) -> int | None:
    string, separator, written = read[: spec.length], read[spec.length : spec.length + 1], read[spec.length + 1 :]
    assert separator in ([], [spec.symbols])
    return string[len(written)] if separator else None


def solve_sorting(spec: Any, read: list[int]) -> int | None:
    if spec.symbols not in read:
        return None
    middle = read.index(spec.symbols)
    left = Counter(read[:middle]) - Counter(read[middle + 1 :])
    return min(left)


def solve_induction(spec: Any, read: list[int]) -> int | None:
    if len(read) < spec.length:
        return None
    [before] = [follower for token, follower in pairwise(read) if token == read[-1]]
    return before


def solve_needle(spec: Any, read: list[int]) -> int | None:
    if len(read) < spec.length:
        return None
    [(key, value)] = [pair for pair in pairwise(read) if pair[1] >= spec.fillers + spec.keys]
    assert spec.fillers <= key == read[-1] < spec.fillers + spec.keys
    return value


def solve_modular(spec: Any, read: list[int]) -> int | None:
    p = spec.modulus
    if len(read) < 4:
        return None
    assert read[1] == p and read[3] == p + 1
    return (read[0] + read[2]) % p


def solve_dyck(spec: Any, read: list[int]) -> int | None:
    stack: list[int] = []
    for token in read:
        if token < spec.brackets:
            stack.append(token)
        else:
            assert stack.pop() == token - spec.brackets
    assert len(stack) <= spec.depth
    return stack[-1] + spec.brackets if stack else None


SOLVERS: dict[str, Callable[[Any, list[int]], int | None]] = {
    "recall": solve_recall,
    "copying": solve_copying,
    "induction": solve_induction,
    "needle": solve_needle,
    "modular": solve_modular,
    "dyck": solve_dyck,
    "sorting": solve_sorting,
}
UNSURE = {"episodes", "two_sources"}
"""Tasks whose answers nobody can be sure of: see test_uncertain_tasks."""
TASKS = sorted({*SOLVERS, *UNSURE})


def test_every_task_has_a_solver_here_or_is_uncertain() -> None:
    assert {kind for kind in kinds("data") if issubclass(resolve("data", kind), TaskSpec)} == set(TASKS)
    assert "task" not in kinds("data") and "_task" not in kinds("data")


@pytest.mark.parametrize("fields", [{}, ODD], ids=["default", "odd"])
@pytest.mark.parametrize("kind", sorted(SOLVERS))
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_solver_that_reads_up_to_a_token_knows_each_answer(kind: str, fields: dict[str, Any], split: str) -> None:
    spec = task(kind, **fields.get(kind, {}))
    for ids, following in rows_of(getattr(spec.prepare(), split), 40):
        assert len(ids) == len(following) == spec.block
        assert all(0 <= token < spec.vocabulary for token in ids)
        assert any(answer >= 0 for answer in following)
        for t, answer in enumerate(following):
            known = SOLVERS[kind](spec, ids[: t + 1])
            asked = known if kind != "dyck" or t + 1 == len(ids) or ids[t + 1] >= spec.brackets else None  # type: ignore[attr-defined]
            assert answer == (-100 if asked is None else asked)
            assert answer < 0 or t + 1 == len(ids) or ids[t + 1] == answer, "the answer stands where it is read next"


def test_examples_have_the_shape_that_their_task_promises() -> None:
    recall = task("recall", **ODD["recall"])
    for ids, _ in rows_of(recall.prepare().train, 50):
        assert len(set(ids[:10:2])) == 5 and max(ids[:10:2]) < 7 <= min(ids[1:10:2])
        assert len(set(ids[10::2])) == 3, "each key is asked once"
    induction = task("induction", **ODD["induction"])
    rows = rows_of(induction.prepare().train, 400)
    assert all(ids.count(ids[-1]) == 2 for ids, _ in rows)
    assert {ids.index(ids[-1]) for ids, _ in rows} == set(range(7))
    assert {ids[-1] for ids, _ in rows} == set(range(5))
    needle = task("needle", **ODD["needle"])
    depths = Counter(next(t for t, x in enumerate(ids) if x >= 3) for ids, _ in rows_of(needle.prepare().train, 900))
    assert depths.keys() == set(range(9)) and min(depths.values()) > 60, "all depths are equally likely"
    dyck = task("dyck", **ODD["dyck"])
    deepest = set()
    for ids, following in rows_of(dyck.prepare().train, 100):
        whole = [*ids, following[-1]]
        heights = np.cumsum([1 if token < 3 else -1 for token in whole])
        assert heights[-1] == 0 and heights.min() == 0
        deepest.add(int(heights.max()))
    assert deepest == {1, 2, 3} or deepest == {2, 3}


# -------------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("kind", TASKS)
def test_no_example_is_in_two_splits_even_where_there_are_few(kind: str) -> None:
    prepared = task(kind, **FEW[kind]).prepare()
    seen = {}
    for name, count in (("train", 3000), ("valid", 400), ("test", 400)):
        rows = rows_of(getattr(prepared, name), count)
        seen[name] = {(*ids, following[-1]) for ids, following in rows}
        assert len(seen[name]) < count, "examples come again, so that a common one would be met"
    assert not seen["train"] & seen["valid"]
    assert not seen["train"] & seen["test"]
    assert not seen["valid"] & seen["test"]


def test_all_strings_are_in_one_split_or_another() -> None:
    prepared = task("copying", **FEW["copying"]).prepare()
    splits = prepared.train, prepared.valid, prepared.test
    assert len({tuple(ids) for split in splits for ids, _ in rows_of(split, 3000)}) == 4**3


def test_modular_pairs_are_divided_outright_and_each_epoch_sees_each_pair_once() -> None:
    prepared = task("modular", modulus=11, share=0.4, examples=30).prepare()
    assert [len(split) for split in (prepared.train, prepared.valid, prepared.test)] == [48, 30, 30]
    for epoch in range(2):
        batch = prepared.train.batch(Key(0), epoch, 48)
        assert sorted(batch["example"].tolist()) == list(range(48))
        assert len({tuple(ids) for ids in batch["ids"].tolist()}) == 48
    whole = task("modular", modulus=11, share=0.5, examples=30).prepare()
    pairs = [
        tuple(b["ids"][0].tolist()) for name in ("train", "valid", "test") for b in getattr(whole, name).evaluation(1)
    ]
    assert len(pairs) == len(set(pairs)) == 60 + 30 + 30


@pytest.mark.parametrize("kind", TASKS)
def test_a_batch_is_a_function_of_key_and_step_and_an_example_of_its_number(kind: str) -> None:
    spec = task(kind, **ODD[kind])
    train = spec.prepare().train
    whole = train.batch(Key(3), 2, 6)
    again = task(kind, **ODD[kind]).prepare().train.batch(Key(3), 2, 6)
    assert all(torch.equal(whole[name], again[name]) for name in ("ids", "next", "example"))
    pieces = [train.batch(Key(3), 2, 2, micro, 3) for micro in range(3)]
    assert torch.equal(torch.cat([piece["ids"] for piece in pieces]), whole["ids"])
    ranks = [train.batch(Key(3), 2, 3, rank=rank, ranks=2) for rank in range(2)]
    assert torch.equal(torch.cat([piece["next"] for piece in ranks]), whole["next"])
    for other in (train.batch(Key(4), 2, 6), train.batch(Key(3), 3, 6)):
        assert not torch.equal(other["example"], whole["example"])
    number = int(whole["example"][4])
    assert spec.sequences("train", np.array([number]))[0][0, :-1].tolist() == whole["ids"][4].tolist()


def test_valid_and_test_are_fixed_by_the_task_and_read_in_order() -> None:
    spec = task("copying", examples=23)
    valid, test = spec.prepare().valid, spec.prepare().test
    assert len(valid) == len(test) == 23
    by_four, by_seven = (torch.cat([batch["ids"] for batch in valid.evaluation(size)]) for size in (4, 7))
    assert torch.equal(by_four, by_seven) and len(by_four) == 23
    assert [len(batch["ids"]) for batch in valid.evaluation(4, 6)] == [4, 2]
    some = torch.cat([batch["example"] for batch in valid.evaluation(4, 6)]).tolist()
    assert some == [number * 23 // 6 for number in range(6)]
    assert list(valid.evaluation(4, 0)) == []
    other = task("copying", examples=23, seed=1).prepare()
    assert not torch.equal(torch.cat([batch["ids"] for batch in other.valid.evaluation(23)]), by_four)
    assert other.hash != spec.prepare().hash == task("copying", examples=23).prepare().hash


# ------------------------------------------------------------------------------------------------------------- metrics


def recipe(folder: Path, data: Any, **sections: Any) -> dict[str, Any]:
    return {**tiny.recipe(folder, **sections), "data": data}


SHORT = {"kind": "copying", "length": 3, "symbols": 4, "examples": 21}


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(causal_lm, "_LOGITS", request.param)


@pytest.mark.parametrize("at_once", [1, 1 << 23], ids=["row by row", "all rows"], indirect=True)
@pytest.mark.usefixtures("at_once")
def test_accuracy_and_exact_equal_a_count_by_hand(tmp_path: Path) -> None:
    trainer = tiny.trainer(recipe(tmp_path, SHORT, trainer={"batch": 4}, optimizer={"lr": 0.03}))
    for _ in range(40):
        trainer.train_step()
    split = trainer.source.test
    assert split is not None
    answers = right = whole = 0
    trainer.model.eval()
    with torch.no_grad():
        for batch in split.evaluation(1):
            [guess], [following] = trainer.model(tokens_of(batch)).logits.argmax(-1).tolist(), batch["next"].tolist()
            hits = [a == b for a, b in zip(guess, following, strict=True) if b >= 0]
            answers, right, whole = answers + len(hits), right + sum(hits), whole + all(hits)
    assert answers == 3 * 21 and 0 < whole < right / 3 < 21
    row = trainer.measure_split(split, "test")
    assert row["test_accuracy"] == pytest.approx(right / answers)
    assert row["test_exact"] == pytest.approx(whole / 21)
    assert "test_bits_per_byte" not in row


def test_scores_of_given_guesses() -> None:
    split = task("copying", length=2, symbols=3).prepare().valid
    following = torch.tensor([[-100, -100, 0, 1], [-100, -100, 2, 2], [-100, -100, 1, 0]])
    guess = torch.tensor([[0, 0, 0, 1], [0, 0, 2, 1], [-1, -1, 0, 1]])
    found = {name: (int(a), int(b)) for name, (a, b) in split.score(guess, {"next": following}).items()}
    assert found == {"accuracy": (3, 6), "exact": (1, 3)}


def test_text_has_no_accuracy(tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.recipe(tmp_path))
    assert set(trainer.measure_split(trainer.source.valid, "valid")) == {"valid_loss", "valid_bits_per_byte"}  # type: ignore[arg-type]


def of_a_rank(mesh: Mesh | None, folder: Path) -> dict[str, float]:
    more = {} if mesh is None else {"mesh": mesh}
    trainer = tiny.trainer(recipe(folder, SHORT, trainer={"batch": 4}), torch.float64, **more)
    return {
        **trainer.measure_split(trainer.source.valid, "valid"),
        **trainer.measure_split(trainer.source.test, "t", 3),
    }  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_ranks_give_the_metrics_of_one(tmp_path: Path) -> None:
    alone = of_a_rank(None, tmp_path)
    assert 0 < alone["valid_accuracy"] < 1
    for found in run_ranks(of_a_rank, 2, tmp_path):
        assert found == pytest.approx(alone, rel=1e-12)


# ----------------------------------------------------------------------------------------------------- from a recipe on


def test_a_word_is_a_task_unless_a_file_has_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = {"data": {"corpus": "stdlib", "tokenizer": "bytes", "block": 64}}
    assert load_recipe(text, ["data=recall"]).data == task("recall")
    assert load_recipe(text, ["data=recall", "data.pairs=3", "data.queries=2"]).data == task(
        "recall", pairs=3, queries=2
    )
    assert load_recipe({"data": "stdlib"}).data.kind == "text"
    assert load_recipe({"data": "recalls"}).data.corpus.path == "recalls"  # type: ignore[attr-defined]
    (tmp_path / "recall").write_text("a text")
    assert load_recipe(text, ["data=recall"]).data.corpus.path == "recall"  # type: ignore[attr-defined]


@pytest.mark.usefixtures("no_plot")
def test_a_run_of_a_task_trains_loads_and_counts_but_writes_no_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = tiny.recipe(tmp_path)
    run = torchstone.train(
        body, ["data=needle", "data.length=9", "model.position=learned"], out=tmp_path / "a", quiet=True
    )
    spec: Any = run.recipe.model
    assert (spec.vocabulary, spec.context) == (64, 9)
    last = run.metrics()[-1]
    assert {"test_loss", "test_accuracy", "test_exact"} <= last.keys() and "test_bits_per_byte" not in last
    assert not (run.path / "tokenizer.json").exists()
    logits = torchstone.load(run.path).model()(torch.zeros(1, 9, dtype=torch.int64)).logits
    assert logits.shape == (1, 9, 64)
    counts = torchstone.inspect(run.path)
    assert counts == torchstone.inspect(run.recipe)
    open_ = torchstone.inspect(body, ["data=needle", "data.length=9", "model.position=learned"])
    assert open_["parameters"] == counts["parameters"] == sum(p.numel() for p in run.model().parameters())
    with pytest.raises(TorchstoneError, match="is a text, and the engine has no tokenizer; give token ids"):
        run.generate("key")
    with pytest.raises(SystemExit) as left:
        main(["generate", str(run.path), "--prompt", "key"])
    said = capsys.readouterr()
    assert left.value.code == 2 and said.out == ""
    assert said.err == "torchstone: prompt: is a text, and the engine has no tokenizer; give token ids\n"


@pytest.mark.usefixtures("no_plot")
def test_a_run_of_a_task_that_was_cut_goes_on_bit_for_bit(tmp_path: Path) -> None:
    body = recipe(tmp_path, "recall")
    whole = torchstone.train(body, out=tmp_path / "whole", quiet=True)
    with tiny.cut_after(3):
        torchstone.train(body, out=tmp_path / "cut", quiet=True)
    tiny.assert_same_run(torchstone.train(body, out=tmp_path / "cut", resume=True, quiet=True), whole)


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time of a tiny training is its plot."""
    monkeypatch.setattr("torchstone.train.training.plot_curve", lambda *arguments: None)


REFUSED: list[tuple[list[str], str]] = [
    (["data=recall", "data.pairs=33"], "data: 33 pairs need as many different keys, keys is 32"),
    (["data=recall", "data.pairs=2"], "data: 4 queries need as many pairs, pairs is 2"),
    (["data=dyck", "data.length=7"], "data: length 7 is odd, and a balanced string is even"),
    (["data=dyck", "data.length=4"], "data: depth 4 cannot be reached in length 4, 2 can"),
    (["data=needle", "data.length=2"], "data.length: input should be greater than or equal to 3, got '2'"),
    (["data=induction", "data.length=2"], "data.length: input should be greater than or equal to 3, got '2'"),
    (["data=two_sources", "data.branches=9"], "data: 9 branches need as many symbols, symbols is 8"),
    (["data=episodes", "data.flips=1"], "data.flips: input should be less than 1, got '1'"),
    (["data=episodes", "data.questions=0"], "data.questions: input should be greater than or equal to 1, got '0'"),
    (["data=copying", "data.block=8"], "data: no field 'block'; fields: kind, seed, examples, length, symbols"),
    (
        ["data=modular", "data.modulus=7"],
        "data: modulus 7 has 49 pairs, share 0.5 takes 24 for train, and valid and test need 512 each",
    ),
    (
        ["data=copying", "data.length=1", "data.symbols=2"],
        "data copying: has too few different examples for three splits, none of 500 draws is of valid; "
        "make the task larger",
    ),
    (["data=recall", "model.vocabulary=10"], "model.vocabulary: 10 is fewer than data recall's 64"),
    (
        ["data=copying", "objective=masked_lm", "model.causal=false", "model.head=mlm"],
        "objective masked_lm: the tokenizer has no mask token",
    ),
]


@pytest.mark.parametrize(("overrides", "sentence"), REFUSED, ids=[" ".join(changes) for changes, _ in REFUSED])
def test_what_makes_no_sense_is_refused_in_a_sentence(overrides: list[str], sentence: str, tmp_path: Path) -> None:
    body = tiny.recipe(tmp_path)
    before = tiny.listing(tmp_path)
    with pytest.raises(TorchstoneError) as caught:
        torchstone.train(body, overrides, out=tmp_path / "run", quiet=True)
    assert str(caught.value) == sentence
    assert tiny.listing(tmp_path) == before


@pytest.mark.slow
def test_copying_is_learned_by_attention_that_reaches_the_string_and_not_by_one_that_does_not(tmp_path: Path) -> None:
    """A window of 4 in each of two layers sees 6 tokens back; the string's symbols are 9 back."""
    body = recipe(
        tmp_path,
        {"kind": "copying", "length": 8, "symbols": 8, "examples": 128},
        model={"width": 32, "depth": 2, "ffn": {"kind": "mlp", "hidden": 32}},
        optimizer={"lr": 5e-3, "weight_decay": 0.01},
        schedule={"kind": "cosine", "warmup": 50},
        trainer={"steps": 300, "batch": 64, "save_every": 300},
        evaluate={"every": 300},
    )
    accuracy = {}
    for window in (None, 4):
        run: RunFolder = torchstone.train(
            body, [{"model": {"attention": {"window": window}}}], out=tmp_path / f"{window}", quiet=True
        )
        accuracy[window] = run.metrics()[-1]["test_accuracy"]
    assert accuracy[None] > 0.95
    assert accuracy[4] < 0.25, "chance is 1/8"


@pytest.mark.slow
def test_compare_asks_for_the_accuracy_of_a_task(tmp_path: Path) -> None:
    body = tiny.recipe(tmp_path)
    result = torchstone.compare(
        ["data=modular", "data.modulus=11", "data.examples=30", "model.position=rotary,none"],
        2,
        recipe=body,
        out=tmp_path / "compared",
        quiet=True,
    )
    assert result.metric.name == "test_accuracy" and not result.metric.lower_is_better
    assert [sorted(arm.cells[1.0]) for arm in result.arms] == [[0, 1], [0, 1]]
    assert all(0 <= cell["metrics"]["test_accuracy"] <= 1 for arm in result.arms for cell in arm.cells[1.0].values())
