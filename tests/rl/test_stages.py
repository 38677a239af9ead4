"""The four stages of DeepSeek-R1 with what there is, and what is refused before any of them writes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from string import ascii_letters
from typing import Any

import pytest
import yaml

import tiny
from torchstone.errors import TorchstoneError
from torchstone.rl.trajectory import read
from torchstone.train import training
from torchstone.train.training import train

DIGITS = (0, 1, 2, 3)
RULES = [
    {"kind": "exact", "pattern": r"\.(.*)"},
    {"kind": "language", "alphabet": "01234+", "others": "p", "inside": r"^(.*)\."},
]


def rows(path: Path, made: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


@pytest.mark.slow
def test_cold_start_policy_gradients_rejection_sampling_policy_gradients(
    tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command line; the base knows no thoughts, and every stage gets the weights that it should."""
    monkeypatch.setattr(training, "plot_curve", lambda *arguments: None)
    rng = random.Random(0)
    # a letter before the digit, so that no split of the prompts takes a digit away
    plain = [{"prompt": f"{c}{d}", "response": f".{rng.choice((d + 1, 0))}"} for c in ascii_letters for d in DIGITS]
    cold = [{"prompt": f"{c}{d}", "response": f"{d}{rng.choice('+p')}1.{d + 1}"} for c in ascii_letters for d in DIGITS]
    asked = [{"prompt": f"{c}{d}", "answer": d + 1} for c in ascii_letters[:10] for d in DIGITS]
    general = [{"prompt": f"{c}?", "response": "0.m"} for c in ascii_letters]
    everything = [*asked, *({"prompt": f"{c}?", "answer": "m"} for c in ascii_letters[:10])]
    made = {"plain": plain, "cold": cold, "asked": asked, "general": general, "all": everything}
    texts = {name: rows(tmp_path / f"{name}.jsonl", lines) for name, lines in made.items()}
    good = tmp_path / "good.jsonl"

    def stage(name: str, steps: int, start: str | None, files: Any, policy: bool = False) -> Path:
        recipe: dict[str, Any] = {
            "data": {"kind": "prompts" if policy else "responses", "path": files, "block": 16,
                     "cache": str(tmp_path / "cache")},
            "optimizer": {"lr": 2e-3 if policy else 1e-2, "weight_decay": 0.0},
            "trainer": {"steps": steps, "batch": 4 if policy else 32, "device": "cpu", "threads": 1, "compile": "off"},
            "evaluate": {"every": steps, "test": False},
        }  # fmt: skip
        if policy:
            recipe["data"]["valid"] = files
            recipe["objective"] = {"kind": "policy_gradient", "group": 4, "rewards": RULES,
                                   "sampling": {"max_new_tokens": 8}}  # fmt: skip
        if start is None:
            recipe |= {"model": {"width": 32, "depth": 1, "attention": {"heads": 2}}}
            recipe["data"]["tokenizer"] = "bytes"
        else:
            recipe["init_from"] = str(tmp_path / start)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        done = cli("train", tmp_path / f"{name}.yaml", "--out", tmp_path / name)
        assert done.status == 0, done.err
        return tmp_path / name

    def pass_at_1(run: Path) -> list[float]:
        logged = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [row["valid_pass@1"] for row in logged if "valid_pass@1" in row]

    stage("base", 200, None, texts["plain"])
    stage("first", 150, "base", texts["cold"])
    second = stage("second", 30, "first", texts["asked"], policy=True)
    done = cli("rl", "sample", second, texts["asked"], "--n", 4, "--out", tmp_path / "dump.jsonl")
    assert done.status == 0, done.err
    done = cli("rl", "filter", tmp_path / "dump.jsonl", "--out", good, "--at-least", 2)
    assert done.status == 0, done.err
    kept = [json.loads(line) for line in good.read_text().splitlines()]
    full = {(each.prompt_text, each.text) for each in read(tmp_path / "dump.jsonl")[0] if each.reward == 2}
    assert kept and {(row["prompt"], row["response"]) for row in kept} == full
    assert all(row["response"].endswith(f".{int(row['prompt'][1]) + 1}") and "p" not in row["response"] for row in kept)
    stage("third", 150, "base", [str(good), texts["general"]])
    fourth = stage("fourth", 20, "third", texts["all"], policy=True)

    # a base that answers without a thought is right half of the time; after four stages it is nearly always
    assert pass_at_1(fourth)[-1] > 0.85
    dump = tmp_path / "last.jsonl"
    assert cli("rl", "sample", fourth, texts["all"], "--n", 1, "--out", dump, "--json").status == 0
    last, _ = read(dump)
    thinks = [each for each in last if each.rewards["language"] == 1.0]
    assert len(thinks) / len(last) > 0.85 and {each.prompt_text[-1] for each in thinks} == {"0", "1", "2", "3", "?"}


@pytest.mark.parametrize(("answer", "has"), [({}, "no"), ({"answer": None}, "null in")])
def test_prompts_without_an_answer_are_refused_before_anything_is_written(
    answer: dict[str, Any], has: str, tmp_path: Path
) -> None:
    made = tiny.prompted(tmp_path, objective={"rewards": [{"kind": "math_answer"}]})
    made["data"]["path"] = rows(
        tmp_path / "two.jsonl", [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", **answer}]
    )
    with pytest.raises(TorchstoneError, match=f"reward math_answer: '.*two.jsonl' line 2 has {has} field 'answer'"):
        train(made, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_group_of_one_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TorchstoneError, match=r"objective\.group: .*greater than or equal to 2"):
        train(tiny.prompted(tmp_path, objective={"group": 1}), out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["float('nan')", "[1.0, 0.0]"])
def test_a_reward_that_is_no_number_ends_the_training_and_names_the_prompt(value: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(f"def f(text, row):\n    return {value} if row['prompt'] == '3' else 1.0\n")
    own = {"kind": "python", "function": f"{tmp_path / 'own.py'}:f"}
    made = tiny.prompted(tmp_path, objective={"rewards": [own], "group": 2, "sampling": {"max_new_tokens": 2}})
    made["data"]["path"] = rows(tmp_path / "five.jsonl", [{"prompt": str(n)} for n in range(5)])
    made["data"]["valid"] = made["data"]["test"] = made["data"]["path"]  # each prompt is measured before any step
    with pytest.raises(TorchstoneError, match=r"reward python: gave .* for an answer to '.*five.jsonl' line 4; a f"):
        train({**made, "evaluate": {"every": 4, "blocks": 5}}, out=tmp_path / "run", quiet=True)
