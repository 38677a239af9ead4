"""Tasks of lm-evaluation-harness on our scorer: its figures beside our own on the same items, without a network."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import torchstone
from torchstone.data import Tokenizer
from torchstone.errors import TorchstoneError
from torchstone.evaluate import Scorer
from torchstone.generate import Sampling

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow  # importing the harness takes seconds

ROLLING = "loglikelihood_rolling"


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``task(name, records, **fields)``: a task file with its data beside it; gives their folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "tasks"
    folder.mkdir()

    def write(name: str, records: list[dict[str, Any]], **fields: Any) -> Path:
        data = folder / f"{name}.jsonl"
        data.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        files = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
        body = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **fields}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(body))
        return folder

    return write


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    """What the harness hands to a model."""
    return [SimpleNamespace(args=some) for some in arguments]


def questions(count: int) -> list[dict[str, Any]]:
    rng = random.Random(0)

    def words() -> str:
        return " ".join("".join(rng.choices("abcdefghij", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 3)))

    return [
        {"prompt": words(), "choices": [f" {words()}" for _ in range(3)], "answer": rng.randrange(3)}
        for _ in range(count)
    ]


def test_a_task_of_the_harness_gives_the_accuracies_that_we_give(
    run: Path, task: Callable[..., Path], jsonl: Callable[..., str]
) -> None:
    items = questions(40)
    folder = task(
        "local_choice",
        items,
        output_type="multiple_choice",
        doc_to_text="{{prompt}}",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        target_delimiter="",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    ours, theirs = torchstone.load(run).evaluate(
        multiple_choice=jsonl(*items), tasks="local_choice", include_path=folder, batch=5
    )
    assert theirs.facts == {"items": 40}
    assert theirs["acc"] == ours["accuracy"] and theirs["acc_norm"] == ours["accuracy_per_byte"]
    assert ours["accuracy"].value != ours["accuracy_per_byte"].value
    (some,) = torchstone.load(run).evaluate(tasks="local_choice", include_path=folder, limit=7)
    assert some.facts == {"items": 7}


def test_the_command_prints_one_document(cli: Callable[..., Any], run: Path, task: Callable[..., Path]) -> None:
    text = "the whole of a text that is longer than one window of sixteen tokens"
    folder = task(
        "local_rolling",
        [{"text": text}, {"text": text[:9]}],
        output_type=ROLLING,
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    said = cli("evaluate", run, "--tasks", "local_rolling", "--include-path", folder, "--device", "cpu", "--json")
    assert said.status == 0, said.err
    (result,) = json.loads(said.out)["results"]
    ours = torchstone.load(run).evaluate(text=str(folder / "local_rolling.jsonl"), stride=16)[0]
    assert result["metrics"]["bits_per_byte"]["value"] == pytest.approx(ours["bits_per_byte"].value, rel=1e-5)
    assert result["task"] == "local_rolling"


def test_a_continuation_is_greedy_if_the_engine_would_write_it(gpt2: Any, letters: Tokenizer) -> None:
    from torchstone.evaluate.harness import HarnessModel

    model = HarnessModel(Scorer(gpt2.ours, letters, batch=2))
    prompts = [f"{letter}b" for letter in "acdefghijklmnopqrstuvwxyz"]
    written = model.engine.generate(prompts, Sampling(max_new_tokens=2, temperature=0))
    # what random weights write is not often text
    prompt, done = next(
        (p, done) for p, done in zip(prompts, written, strict=True) if all(33 < token < 127 for token in done.ids)
    )
    other = done.text[:-1] + ("x" if done.text[-1] != "x" else "y")
    (a, same), (b, differs) = model.loglikelihood(requests((prompt, done.text), (prompt, other)))
    assert same and not differs and a > b
    assert model.loglikelihood(requests(("abc", "z")))[0][0] == pytest.approx(
        model.loglikelihood(requests(("0123456789abc", "zz"), ("abc", "z")))[1][0], rel=1e-5
    )


def test_texts_are_written_greedily_up_to_the_stop_string(run: Path) -> None:
    from torchstone.evaluate.harness import HarnessModel

    folder = torchstone.load(run)
    model = HarnessModel(Scorer.of_run(folder, batch=2))
    prompts = ["abc", "the quick", "a", "", "abc def gh"]
    options = {"until": ["\n"], "max_gen_toks": 6}
    texts = model.generate_until(requests(*((prompt, options) for prompt in prompts)))
    wanted = folder.generate(prompts, max_new_tokens=6, temperature=0, stop=["\n"])
    assert texts == [done.text for done in wanted]
    until = texts[0][1] if len(texts[0]) > 1 else "\n"
    (cut,) = model.generate_until(requests(("abc", {"until": until, "max_gen_toks": 6})))
    assert cut == texts[0].split(until)[0]


def test_a_long_prompt_leaves_room_for_what_is_written(gpt2: Any, letters: Tokenizer) -> None:
    from torchstone.evaluate.harness import HarnessModel

    model = HarnessModel(Scorer(gpt2.ours, letters))
    options = {"max_gen_toks": 4}
    long, short = model.generate_until(requests(("0123456789abcdefghij", options), ("cdefghij", options)))
    assert long == short  # of 12 positions, 8 are left for the prompt


def test_a_masked_model_is_scored_and_writes_nothing(masked_run: Path) -> None:
    from torchstone.evaluate.harness import HarnessModel

    model = HarnessModel(Scorer.of_run(torchstone.load(masked_run)))
    (pair,) = model.loglikelihood(requests(("ab", "cd")))
    (rolled,) = model.loglikelihood_rolling(requests(("cd",)))
    assert pair[0] < 0 and rolled < 0
    with pytest.raises(TorchstoneError, match="writes no text"):
        model.generate_until(requests(("ab", {})))


def test_a_task_that_does_not_exist_or_cannot_be_loaded(
    cli: Callable[..., Any], run: Path, task: Callable[..., Path], tmp_path: Path
) -> None:
    folder = task("broken", [{"text": "a"}], output_type=ROLLING, doc_to_text="", doc_to_target="{{text}}")
    (folder / "broken.jsonl").unlink()
    said = cli("evaluate", run, "--tasks", "broken", "--include-path", folder, "--device", "cpu", "--json")
    assert said.status == 2 and said.out == "" and said.err.splitlines()[-1].startswith("torchstone: tasks broken: ")
    said = cli("evaluate", run, "--tasks", "brokn", "--include-path", folder, "--device", "cpu")
    assert said.status == 2 and "has no task 'brokn' (did you mean 'broken'?)" in said.err.splitlines()[-1]
    said = cli("evaluate", run, "--tasks", "broken", "--include-path", tmp_path / "none")
    assert said.status == 2 and "is no folder" in said.err


def test_what_the_model_refuses_stays_its_own_sentence(
    cli: Callable[..., Any], masked_run: Path, task: Callable[..., Path]
) -> None:
    folder = task(
        "local_writing",
        [{"text": "a", "answer": "b"}],
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 2},
        metric_list=[{"metric": "exact_match"}],
    )
    command = ("evaluate", masked_run, "--tasks", "local_writing", "--include-path", folder, "--device", "cpu")
    said = cli(*command)
    assert said.status == 2 and said.out == ""
    assert said.err.splitlines()[-1].startswith("torchstone: evaluate: a masked language model writes no text")
