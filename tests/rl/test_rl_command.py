"""Sampling, replaying and filtering: from a policy to text to tune on, by the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from torchstone.errors import TorchstoneError
from torchstone.rl import dumps
from torchstone.rl.reward import Scorer
from torchstone.rl.trajectory import Trajectory, dump, read
from torchstone.spec import resolve, validate
from torchstone.train import training
from torchstone.train.training import train


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(training, "plot_curve", lambda *arguments: None)
    settings = {"steps": 1, "batch": 2, "device": "cpu", "threads": 1, "compile": "off"}
    train(tiny.prompted(tmp_path, trainer=settings), out=tmp_path / "run", quiet=True)
    return tmp_path / "run"


def test_from_a_policy_to_text_that_a_model_is_tuned_on(run: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    dumped, kept = tmp_path / "dump.jsonl", tmp_path / "kept.jsonl"
    done = cli("rl", "sample", run, tmp_path / "sums.jsonl", "--n", 3, "--limit", 8, "--out", dumped, "--json")
    assert done.status == 0, done.err
    found, settings = read(dumped)
    said = json.loads(done.out)
    assert said["answers"] == len(found) == 24 and said["prompts"] == 8 and settings["max_new_tokens"] == 5
    assert said["reward"] == pytest.approx(sum(each.reward or 0 for each in found) / 24)
    assert said["rewards"] == {"language": pytest.approx(said["reward"])} and said["pass@3"] >= said["pass@1"]
    assert said["cons@3"] is None  # this rule finds no answer to vote with
    assert [each.example for each in found] == [n // 3 for n in range(24)] and found[0].prompt_text == "0+0="

    done = cli("rl", "replay", dumped, run, "--json")
    again = json.loads(done.out)
    assert again["answers"] == 24 and again["sampler_gap"] < 1e-5 and again["sampler_kl"] < 1e-9
    assert again["tokens"] == sum(len(each.ids) for each in found) and abs(again["loss"]) < 1.0

    text = dumped.read_text().replace('"finish": "length"', '"finish": "eos"')  # so that some are kept
    dumped.write_text(text)
    done = cli("rl", "filter", dumped, "--out", kept, "--at-least", 0.4, "--per-prompt", 2)
    assert done.status == 0, done.err
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    good = {(each.prompt_text, each.text) for each in found if (each.reward or 0) >= 0.4}
    assert rows and {(row["prompt"], row["response"]) for row in rows} <= good
    assert max(sum(row["prompt"] == one["prompt"] for row in rows) for one in rows) <= 2

    wanted = rows[0]["response"]
    done = cli("rl", "filter", dumped, "--out", kept, "--at-least", 0.4, "--drop", f"^{re.escape(wanted)}$")
    assert done.status == 0 and wanted not in [json.loads(line)["response"] for line in kept.read_text().splitlines()]

    made = tiny.recipe(tmp_path, trainer={"steps": 1})
    made["data"] = {
        "kind": "responses",
        "path": str(kept),
        "tokenizer": "bytes",
        "block": 24,
        "cache": str(tmp_path / "c"),
    }
    tuned = train({**made, "init_from": str(run)}, out=tmp_path / "tuned", quiet=True)
    assert (tuned.path / "model.safetensors").exists()


def test_what_a_training_says_is_rewards_and_lengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "plot_curve", lambda *arguments: None)
    (tmp_path / "own.py").write_text("def f(text, row):\n    return None if len(text) % 2 else 1.0\n")
    own = {"rewards": [{"kind": "python", "function": f"{tmp_path / 'own.py'}:f"}]}
    settings = {"steps": 1, "batch": 2, "device": "cpu", "threads": 1, "compile": "off"}
    made = train(tiny.prompted(tmp_path, objective=own, trainer=settings), out=tmp_path / "said")
    row = next(row for row in made.metrics() if "reward" in row)
    said = capsys.readouterr().err
    assert f"reward {row['reward']:.4f}  length {row['length']:.1f}  truncated {row['truncated']:.0%}" in said
    assert f"flat groups {row['flat_groups']:.0%}" in said
    assert 0 < row["unscored"] < 1 and row["reward"] in (0.0, 1.0)


def test_a_consensus_is_the_most_frequent_answer(tmp_path: Path) -> None:
    def of(example: int, *texts: str) -> list[Trajectory]:
        rewards = [{"exact": float(text == "=7")} for text in texts]
        return [
            Trajectory((1,), (2,), (0.0,), "eos", example, "", 0, found, found["exact"], text=text)
            for text, found in zip(texts, rewards, strict=True)
        ]

    rule: Any = validate(resolve("reward", "exact"), {"pattern": "=(.)"})
    answers = [*of(0, "=3", "=7", "=7"), *of(1, "=3", "=7", "=3"), *of(2, "=7", "=3", "no"), *of(3, "no", "no", "no")]
    said = dumps._summary(answers, 3, Scorer([rule]))
    assert (said["pass@1"], said["pass@3"], said["cons@3"]) == (4 / 12, 0.75, 0.5)


def test_routes_are_kept_with_answers_and_bad_ones_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    monkeypatch.setattr(training, "plot_curve", lambda *arguments: None)
    settings = {"steps": 1, "batch": 2, "device": "cpu", "threads": 1, "compile": "off"}
    made = tiny.prompted(tmp_path, objective={"replay": "rollout"}, trainer=settings)
    made["model"] = {**made["model"], "ffn": {"kind": "moe", "experts": 4, "active": 2, "hidden": 16}}
    run, dumped, bad = train(made, out=tmp_path / "run", quiet=True).path, tmp_path / "dump", tmp_path / "bad"
    done = cli("rl", "sample", run, tmp_path / "sums.jsonl", "--n", 2, "--limit", 2, "--out", dumped, "--json")
    assert done.status == 0, done.err
    found, _ = read(dumped)
    assert all(each.routes is not None and len(each.routes) == len(each.prompt + each.ids) - 1 for each in found)
    again = json.loads(cli("rl", "replay", dumped, run, "--json").out)
    assert again["routes_changed"] == again["tokens_rerouted"] == again["routes_missing"] == again["sampler_far"] == 0

    lines = [json.loads(line) for line in dumped.read_text().splitlines()]
    bad.write_text("".join(json.dumps({**line, "routes": None}) + "\n" for line in lines))
    assert json.loads(cli("rl", "replay", bad, run, "--json").out)["routes_missing"] == 1
    routes = lines[1]["routes"]
    wrongs: list[Any] = [[], routes[1:], 3, [routes]]
    for wrong in (65537, -2, 0.5, "a", None, [0], 2**70):
        wrongs.append([[[wrong, *routes[0][0][1:]], *routes[0][1:]], *routes[1:]])
    for each in wrongs:
        bad.write_text("".join(json.dumps(line) + "\n" for line in (lines[0], {**lines[1], "routes": each})))
        with pytest.raises(TorchstoneError, match="line 2: routes are whole numbers from -1 to 32,767, of"):
            read(bad)
    done = cli("rl", "replay", bad, run)
    assert done.status == 2 and "line 2: routes are whole numbers" in done.err.replace("\n", " ")


def test_bad_input_is_one_sentence_and_writes_nothing(run: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    sums, out = tmp_path / "sums.jsonl", tmp_path / "out.jsonl"
    plain = tiny.saved(tmp_path / "plain", tiny.recipe(tmp_path)).path
    other = tmp_path / "other.jsonl"
    other.write_text('{"a": 1}\n')
    empty, strange, negative = (tmp_path / f"{name}.jsonl" for name in ("empty", "strange", "negative"))
    empty.write_text("")
    dump(strange, [Trajectory((9999,), (1,), (0.0,), "eos", n, "", 0, {}, 1.0) for n in (0, 0)], {})
    dump(negative, [Trajectory((1,), (-1,), (0.0,), "eos", n, "", 0, {}, 1.0) for n in (0, 0)], {})
    for arguments, match in (
        (("sample", plain, sums, "--out", out), "needs a reward; this run was trained with none"),
        (("sample", run, sums, "--out", out, "--reward", "nothing"), "no reward kind 'nothing'"),
        (
            ("sample", run, sums, "--out", out, "--reward", "{kind: exact, answer: x}"),
            "line 1 has no field 'x'",
        ),
        (("sample", run, sums, "--out", out, "--template", "no place"), "template: needs {prompt} once"),
        (("sample", run, sums, "--out", sums), "is the file that is read"),
        (("sample", run, empty, "--out", out), "holds no prompt"),
        (("replay", strange, run), "holds the token 9999, and the model has"),
        (("replay", negative, run), "holds the token -1, and the model has"),
        (("filter", strange, "--out", out, "--per-prompt", 0), "per_prompt is 1 or more"),
        (("filter", strange, "--out", out, "--drop", "("), "drop is no regular expression"),
        (("filter", strange, "--out", strange), "is the file that is read"),
        (("sample", run, sums, "--out", out, "--n", 0), "n, batch and limit are 1 or more"),
        (("sample", run, sums, "--out", out, "--field", "q"), "no field 'q'"),
        (("sample", run, sums, "--out", tmp_path / "no" / "x"), "cannot be written"),
        (("replay", other, run), "line 1: no trajectory"),
        (("filter", other, "--out", out), "line 1: no trajectory"),
    ):
        done = cli("rl", *arguments)
        assert done.status == 2 and match in done.err.replace("\n", " "), done.err
        assert not out.exists()
