"""Rules over texts: tables of what they give."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from torchstone.errors import TorchstoneError
from torchstone.rl.dumps import sample
from torchstone.rl.reward import RewardSpec, Scorer
from torchstone.rl.reward.math_answer import final_answer
from torchstone.rl.trajectory import read
from torchstone.spec import resolve, validate
from torchstone.train.training import train


def reward(kind: str, text: str, row: dict[str, Any] | None = None, **fields: Any) -> float | None:
    spec: Any = validate(resolve("reward", kind), fields)
    return spec.build()(text, row or {})


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (r"so \boxed{42}", "42", True),
        ("<think>1</think><answer> 42 </answer>", 42, True),
        ("42", "42", False),  # no answer is given
        ("<answer>42", "42", False),  # does not close
        (r"\boxed{42", "42", False),
        (r"\boxed{1}, no, \boxed{2}", "2", True),
        (r"\boxed{1}, no, \boxed{2}", "1", False),
        ("<answer>1</answer> <answer>2</answer>", "2", True),
        ("<answer><answer>2</answer></answer>", "2", True),
        (r"<answer>it is \boxed{7}</answer>", "7", True),
        (r"\boxed{3} <answer>4</answer>", "4", True),
        (r"<answer>4</answer> \boxed{3}", "3", True),
        (r"\boxed{\frac{1}{2}}", "1/2", True),
        (r"\boxed{\dfrac{2}{4}}", "0.5", True),
        (r"\boxed{0.50}", r"\frac{1}{2}", True),
        (r"\boxed{1,000}", "1000", True),
        (r"\boxed{1,000,000.0}", "1000000", True),
        (r"\boxed{1,00}", "100", False),  # no thousands: two numbers
        ("\\boxed{\u22125}", "-5", True),
        (r"\boxed{5}", "-5", False),
        (r"\boxed{3.0}", "3", True),
        (r"\boxed{$3$}", "3", True),
        (r"\boxed{3 \text{cm}}", "3cm", True),
        (r"\boxed{x^{2}+1}", "x^{2} + 1", True),
        (r"\boxed{1/0}", "1/0", True),
        (r"\boxed{1/0}", "0", False),
        (r"\boxed{2+2}", "4", False),  # nothing is evaluated
        (r"\boxed{72}", "Natalia sold 48/2 = 24 clips. #### 72", True),
        (r"\boxed{.5}", "0.5", True),
        (r"\boxed{\frac12}", "1/2", True),
        (r"\boxed{50\%}", "50", True),
        (r"\boxed{\$5}", "5", True),
        (r"\boxed{\(42\)}", "42", True),
        ("<answer>**42**</answer>", "42", True),
        (r"\boxed{" + "9" * 5000 + "}", "9" * 5000, True),  # more digits than Python reads
        (r"\boxed{" + "9" * 5000 + "}", "9", False),
        (r"\boxed{1/" + "9" * 5000 + "}", "9", False),
        (r"\boxed{\boxed{7}}", "7", True),
        (r"\boxed{a \boxed{7}", "7", True),
        (r"\boxed{" * 5000, "7", False),
        (r"\boxed{}", "0", False),
    ],
)
def test_math_answers(text: str, answer: Any, right: bool) -> None:
    assert reward("math_answer", text, {"answer": answer}) == float(right)


def test_a_text_without_an_answer_has_none() -> None:
    assert final_answer("nothing") is None and final_answer(r"\boxed{a{b}c}") == "a{b}c"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<think>a</think><answer>b</answer>", True),
        ("  <think>a\nb</think>\n\n<answer>b</answer>\n", True),
        ("<think></think><answer></answer>", True),
        ("<think>a</think>so <answer>b</answer>", False),
        ("<think>a<answer>b</answer>", False),
        ("<think>a</think><answer>b", False),
        ("<think>a<think>b</think></think><answer>c</answer>", False),
        ("<think>a</think><answer>b</answer><answer>c</answer>", False),
        ("<answer>b</answer><think>a</think>", False),
        ("<think>a</think><answer>b</answer> bye", False),
    ],
)
def test_the_form_of_thoughts_and_answer(text: str, right: bool) -> None:
    assert reward("think_format", text) == float(right)


def test_shares_of_a_language() -> None:
    assert reward("language", "one two \u0434\u0432\u0430 12") == pytest.approx(2 / 3)  # numbers are of no script
    assert reward("language", "o\u043de two") == 0.5  # a word of two scripts is of none
    assert reward("language", "\u0434\u0432\u0430", script="cyrillic") == 1.0
    assert reward("language", "\u4e8c \u4e09 b", script="cjk") == pytest.approx(2 / 3)
    assert reward("language", "12 +", script="latin") == 0.0
    assert reward("language", "ab 1", alphabet="ab") == pytest.approx(2 / 3)
    assert reward("language", "abAB..", alphabet="ab", others="AB") == 0.5
    assert reward("language", "<think>one</think> \u0434\u0432\u0430", inside="<think>(.*)</think>") == 1.0
    with pytest.raises(TorchstoneError, match="others: goes with an alphabet"):
        reward("language", "", others="a")


def test_exact_answers() -> None:
    row = {"answer": " 5 ", "want": "x"}
    assert reward("exact", "5\n", row) == 1.0 and reward("exact", "5.", row) == 0.0
    assert reward("exact", "=4;=5;", row, pattern="=(.)") == 1.0  # the last match
    assert reward("exact", "nothing", row, pattern="=(.)") == 0.0
    assert reward("exact", "x", row, answer="want") == 1.0
    for pattern, match in (("=.", "needs a group"), ("(", "no regular expression")):
        with pytest.raises(TorchstoneError, match=match):
            reward("exact", "", row, pattern=pattern)


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("def f(text, row):\n    return None if row['skip'] else len(text)\n\n\nnumber = 3\n")
    assert reward("python", "abc", {"skip": False}, function=f"{file}:f") == 3
    assert reward("python", "abc", {"skip": True}, function=f"{file}:f") is None
    for function, match in (
        (f"{tmp_path}/none.py:f", "no such file"),
        (f"{file}:g", "has no function 'g'"),
        (f"{file}:number", "has no function 'number'"),
        ("own", "function"),
    ):
        with pytest.raises(TorchstoneError, match=match):
            reward("python", "", function=function)
    file.write_text("import nothing_of_that_name\n")
    with pytest.raises(TorchstoneError, match=r"cannot be run \(ModuleNotFoundError"):
        reward("python", "", function=f"{file}:f")


def test_programs_run_with_their_tests() -> None:
    row = {"tests": ["assert f(2) == 4", "assert f(3) == 9"]}
    square = "def f(x):\n    return x * x\n"
    for text, right in (
        (square, 1.0),
        (f"so:\n```python\n{square}```\nthat is it", 1.0),
        (f"```\nno\n```\n```py\n{square}```", 1.0),
        (f"<think>f</think><answer>{square}</answer>", 1.0),
        (f"{square}print('said')", 1.0),
        ("def f(x): return 4", 0.0),
        ("def f(x)", 0.0),
        ("import os; os._exit(0)", 0.0),  # leaves before the tests
        ("raise SystemExit(0)", 0.0),
        (f"open('x', 'wb').write(bytes(1 << 25))\n{square}", 0.0),
        ("\ud800", 0.0),
    ):
        assert reward("code_tests", text, row) == right, text
    assert reward("code_tests", "while True: pass", row, seconds=0.5) == 0.0
    assert reward("code_tests", square, {"own": "assert f(1) == 1"}, tests="own") == 1.0
    if sys.platform == "linux":
        assert reward("code_tests", f"x = bytes(1 << 30)\n{square}", row, memory=512) == 0.0


def test_answers_to_vote_with() -> None:
    def answer(kind: str, text: str, **fields: Any) -> Any:
        spec: Any = validate(resolve("reward", kind), fields)
        return spec.answer_of(text)

    assert answer("math_answer", r"\boxed{1/2}") == answer("math_answer", "<answer>0.5</answer>")
    assert answer("math_answer", "5") is None and answer("think_format", "5") is None
    assert answer("exact", " 5") == "5" and answer("exact", "=5;", pattern="=(.)") == "5"
    assert answer("exact", "5", pattern="=(.)") is None


def test_several_rewards_add_up_by_their_weights_and_one_that_cannot_score_leaves_the_answer_out(
    tmp_path: Path,
) -> None:
    (tmp_path / "own.py").write_text("def f(text, row):\n    return row['value']\n")
    own = {"kind": "python", "function": f"{tmp_path / 'own.py'}:f"}

    def scorer(*specs: dict[str, Any]) -> Scorer:
        return Scorer([validate(resolve("reward", spec.pop("kind")), spec) for spec in map(dict, specs)])  # type: ignore[misc]

    def scored(scorer: Scorer, **row: Any) -> dict[str, float | None]:
        (found,) = scorer.score_all(["a"], [{"answer": "a", "other": "a", **row}], [7])
        return found

    both = scorer({"kind": "exact"}, {"kind": "exact", "answer": "other", "weight": 0.5}, {**own, "weight": 2.0})
    assert both.names == ["exact", "exact_2", "python"]
    found = scored(both, value=3)
    assert found == {"exact": 1.0, "exact_2": 1.0, "python": 3.0} and both.total(found) == 7.5
    assert both.total(scored(both, value=None)) is None
    assert scored(both, value=np.float32(3)) == found
    for value in (float("nan"), float("inf"), "1", [1.0], 10**400, 1j):
        with pytest.raises(TorchstoneError, match=r"reward python: gave .* for an answer to prompt 7; a finite number"):
            scored(both, value=value)
    with pytest.raises(TorchstoneError, match=r"reward python: failed for an answer to prompt 7 \(KeyError: 'value'\)"):
        scored(both)
    both.check({0: {"answer": 1, "other": 2}})
    with pytest.raises(TorchstoneError, match="reward exact_2: prompt 1 has no field 'other'; fields: answer"):
        both.check({0: {"answer": 1, "other": 2}, 1: {"answer": 1}})
    assert all(issubclass(resolve("reward", kind), RewardSpec) for kind in ("exact", "math_answer"))


def test_a_reward_may_be_for_prompts_with_a_field_alone(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def f(text, row):\n    assert row['kind'] == 'chat'\n    return len(text) / 10\n")
    rule: Any = validate(resolve("reward", "exact"), {"only": "answer"})
    own: Any = validate(resolve("reward", "python"), {"function": f"{tmp_path / 'own.py'}:f", "only": "kind"})
    scorer = Scorer([rule, own])
    rows = [{"answer": "a"}, {"kind": "chat", "answer": None}, {"answer": "b"}]
    scorer.check(dict(enumerate(rows)))
    found = scorer.score_all(["a", "aaa", "a"], rows, [0, 1, 2])
    assert found == [{"exact": 1.0}, {"python": 0.3}, {"exact": 0.0}]
    assert [scorer.total(each) for each in found] == [1.0, 0.3, 0.0]
    with pytest.raises(
        TorchstoneError, match="rewards: none is for prompt 3; they are for prompts with 'answer', 'kind'"
    ):
        scorer.check({3: {"prompt": "x"}})


def test_a_training_and_its_samples_know_which_reward_is_for_which_prompt(tmp_path: Path) -> None:
    recipe = tiny.prompted(tmp_path, trainer={"steps": 2, "batch": 8}, evaluate={"test": False, "every": 2})
    with (tmp_path / "sums.jsonl").open("a") as file:
        file.write("".join(json.dumps({"prompt": f"say {n}", "chat": True}) + "\n" for n in range(100)))
    (letters,) = recipe["objective"]["rewards"]
    recipe["objective"]["rewards"] = [{"kind": "exact", "only": "answer"}, {**letters, "only": "chat"}]
    run = train(recipe, out=tmp_path / "run", quiet=True)
    row = next(row for row in run.metrics() if "reward_language" in row)
    # about half of the prompts have either; what is not for them is in neither mean
    assert 0 < row["reward_language"] <= 1 and row["unscored"] == 0
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"prompt": "1+1=", "answer": "2"}\n' + '{"prompt": "say 5", "chat": true}\n' * 3)
    said = sample(run, mixed, tmp_path / "answers.jsonl", count=2)
    assert said["prompts"] == 4 and said["answers"] == 8 and said["pass@1"] in (0.0, 0.5, 1.0)
    kept, _ = read(tmp_path / "answers.jsonl")
    assert [sorted(each.rewards) for each in kept] == [["exact"]] * 2 + [["language"]] * 6
