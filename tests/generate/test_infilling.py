"""Filling in: the prompt that a run was trained with, the command, and how often the middle is right."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import tiny
from torchstone.api import Run, load
from torchstone.data.infilling import cut
from torchstone.errors import TorchstoneError
from torchstone.evaluate import Hole, Scorer, infilling, read_holes
from torchstone.evaluate.infilling import edit_similarity
from torchstone.generate import Engine, Sampling
from torchstone.train.training import train

BEGIN, HOLE, END, SEPARATOR = 259, 260, 261, 256
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("infilling")
    made = {}
    for name, data in (
        ("psm", {"kind": "infilling", "block": 64}),
        ("spm", {"kind": "infilling", "mode": "spm", "block": 64}),
        ("plain", {}),
    ):
        recipe = tiny.recipe(folder, data=data, trainer={"steps": 1, "save_every": 1}, evaluate={"every": 1})
        made[name] = load(train(recipe, out=folder / name, quiet=True).path)
    return made


@pytest.mark.parametrize(
    ("mode", "asked"),
    [
        ("psm", [SEPARATOR, BEGIN, *b"ab", HOLE, *b"yz", END]),
        ("spm", [SEPARATOR, BEGIN, HOLE, *b"yz", END, *b"ab"]),
    ],
)
def test_a_run_is_asked_as_it_was_trained(runs: dict[str, Run], mode: str, asked: list[int]) -> None:
    (done,) = runs[mode].generate("ab", suffix="yz", **GREEDY)
    assert done.prompt_ids == asked
    (wanted,) = Engine.of_run(runs[mode]).generate([asked], Sampling(**GREEDY))
    assert (done.ids, done.text) == (wanted.ids, wanted.text)


def test_several_holes_and_empty_sides(runs: dict[str, Run]) -> None:
    done = runs["psm"].generate(["", "a"], suffix=["", "b"], **GREEDY)
    assert done[0].prompt_ids == [SEPARATOR, BEGIN, HOLE, END]
    assert done[1].ids == runs["psm"].generate("a", suffix="b", **GREEDY)[0].ids


def test_the_command_writes_the_middle_alone(runs: dict[str, Run], cli: Callable[..., Any]) -> None:
    options = ("--temperature", "0", "--max-new-tokens", "6", "--device", "cpu")
    (done,) = runs["psm"].generate("ab", suffix="yz", **GREEDY)
    asked = ("generate", runs["psm"].path, "--prompt", "ab", "--suffix", "yz", *options)
    assert cli(*asked).out == done.text + "\n"
    assert cli(*asked, "--echo").out == f"ab{done.text}yz\n"
    assert json.loads(cli(*asked, "--json").out) == [
        {"prompt": "ab", "suffix": "yz", "text": done.text, "ids": done.ids, "finish": done.finish}
    ]
    two = cli(*asked, "--prompt", "c", "--suffix", "d", "--echo").out
    assert two.startswith(f"ab{done.text}yz\nc") and two.endswith("d\n")


def test_what_cannot_fill_in_is_refused(runs: dict[str, Run], cli: Callable[..., Any]) -> None:
    sentence = (
        "infilling: the run's vocabulary has no sentinel tokens; what is trained with data.kind=infilling fills in"
    )
    with pytest.raises(TorchstoneError) as caught:
        runs["plain"].generate("a", suffix="b")
    assert str(caught.value) == sentence
    said = cli("generate", runs["plain"].path, "--prompt", "a", "--suffix", "b", "--device", "cpu")
    assert (said.status, said.out, said.err.strip()) == (2, "", f"torchstone: {sentence}")
    with pytest.raises(TorchstoneError, match="infilling: 2 suffixes for 1 prompts; one each is needed"):
        runs["psm"].generate("a", suffix=["b", "c"])
    with pytest.raises(TorchstoneError, match="no sentinel tokens"):
        infilling(Scorer.of_run(runs["plain"]), [Hole("a", "b", "c")])


# --------------------------------------------------------------------------------------------------------- measuring


def test_edit_similarity_is_levenshteins() -> None:
    @cache
    def distance(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    rng = random.Random(0)
    for _ in range(200):
        a, b = ("".join(rng.choices("abc", k=rng.randint(0, 7))) for _ in range(2))
        assert edit_similarity(a, b) == pytest.approx(1 - distance(a, b) / max(len(a), len(b), 1))
    assert edit_similarity("", "") == 1 and edit_similarity("kitten", "sitting") == pytest.approx(4 / 7)


def test_holes_of_texts_are_lines_and_of_records_as_they_stand(tmp_path: Path) -> None:
    texts = {f"{n}.py": f"one {n}\n\n    two {n}\n123\nthree {n}" for n in range(40)}
    (tmp_path / "texts").mkdir()
    for name, text in texts.items():
        (tmp_path / "texts" / name).write_text(text)
    (tmp_path / "texts" / "none.txt").write_text("1\n2\n")
    holes = read_holes(str(tmp_path / "texts"))
    assert holes == read_holes(str(tmp_path / "texts")) and holes[:3] == read_holes(str(tmp_path / "texts"), 3)
    assert sorted(h.prefix + h.middle + h.suffix for h in holes) == sorted(texts.values())
    assert {h.middle.split()[0] for h in holes} == {"one", "two", "three"}
    assert all(h.prefix[-1:] in ("", "\n") and h.suffix[:1] in ("", "\n") for h in holes)
    with pytest.raises(TorchstoneError, match="holds no line with a letter to leave out"):
        read_holes(str(tmp_path / "texts" / "none.txt"))
    file = tmp_path / "x.jsonl"
    file.write_text('{"prefix": "a", "middle": "b", "suffix": ""}\n{"prefix": "a"}\n')
    assert read_holes(str(file), 1) == [Hole("a", "b", "")]
    with pytest.raises(TorchstoneError, match=r"x.jsonl' line 2: no field 'middle'"):
        read_holes(str(file))


def test_prompts_fit_and_matches_are_counted(runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    holes = [
        Hole("ab", "mid", "yz"),
        Hole("p" * 99, "one\ntwo", "s" * 99),
        Hole("p" * 99, "x", "s"),
        Hole("p", "x", "s" * 99),
    ]
    answers = [" mid ", "one\ntwa", "", "x"]
    asked: list[tuple[list[int], Sampling]] = []

    class Told:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            pass

        def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Any]:
            asked.extend((list(prompt), sampling) for prompt in prompts)
            numbers = [next(n for n, h in enumerate(holes) if _fits(h, list(prompt))) for prompt in prompts]
            return [type("Done", (), {"text": answers[n]})() for n in numbers]

    monkeypatch.setattr(sys.modules[read_holes.__module__], "Engine", Told)
    scorer = Scorer.of_run(runs["psm"], batch=3)
    result = infilling(scorer, holes)
    assert result["exact"].value == 0.5
    assert result["edit_similarity"].value == pytest.approx((1 + 6 / 7 + 0 + 1) / 4)
    assert result.facts == {"holes": 4, "cut": 3, "mode": "psm", "max_new_tokens": 16}
    by_end = {sampling.stop: [len(ids) for ids, s in asked if s is sampling] for _, sampling in asked}
    assert set(by_end) == {(), ("\n",)}
    assert all(len(ids) + 16 - 1 <= 64 for ids, _ in asked)
    # 64 positions, the last of 16 new tokens needs none: 45 for prefix and suffix, what one leaves is the other's
    sides = sorted((ids.index(HOLE) - 2, ids.index(END) - ids.index(HOLE) - 1) for ids, _ in asked)
    assert sides == [(1, 44), (2, 2), (22, 23), (44, 1)]


def _fits(hole: Hole, ids: list[int]) -> bool:
    at, end = ids.index(HOLE), ids.index(END)
    prefix, suffix = bytes(ids[2:at]).decode(), bytes(ids[at + 1 : end]).decode()
    short = [len(hole.prefix) < 30, len(hole.suffix) < 30]
    return (
        hole.prefix.endswith(prefix)
        and hole.suffix.startswith(suffix)
        and all(s == (len(side) < 20) for s, side in zip(short, (prefix, suffix), strict=True))
    )


def test_evaluate_measures_infilling(runs: dict[str, Run], tmp_path: Path, cli: Callable[..., Any]) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"prefix": "a", "middle": "b", "suffix": "c"}\n')
    said = cli("evaluate", runs["spm"].path, "--infilling", file, "--json", "--device", "cpu")
    (result,) = json.loads(said.out)["results"]
    assert (result["task"], result["mode"], result["holes"]) == ("infilling", "spm", 1)
    assert set(result["metrics"]) == {"exact", "edit_similarity"}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["psm", "spm"])
def test_what_was_trained_on_is_filled_in_and_ends(tmp_path: Path, mode: str) -> None:
    """Few texts, many times: asked as in training, a model writes the middle that it knows, and its end."""
    rng = random.Random(0)
    made = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=12)) for _ in range(24)]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in made))
    recipe = tiny.recipe(
        tmp_path,
        data={
            "kind": "infilling",
            "rate": 1.0,
            "mode": mode,
            "block": 64,
            "corpus": {"kind": "jsonl", "path": str(texts)},
        },
        model={"width": 64, "depth": 2},
        optimizer={"kind": "adamw", "lr": 3e-3},
        trainer={"steps": 600, "batch": 4, "save_every": 600},
        evaluate={"every": 600},
    )
    run = load(train(recipe, out=tmp_path / "run", quiet=True).path)
    holes = []
    for document in run.recipe.data.prepare().texts("train"):  # type: ignore[attr-defined]
        prefix, middle, suffix = cut(document.text, 1.0)
        holes.append(Hole(prefix, middle, suffix))
    result = infilling(Scorer.of_run(run), holes, mode=mode)  # type: ignore[arg-type]
    assert len(holes) > 15 and result["exact"].value > 0.8, result
