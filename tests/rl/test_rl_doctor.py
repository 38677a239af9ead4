"""What the doctor reads off metrics: tables of them, made by hand, and a training's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from torchstone.errors import TorchstoneError
from torchstone.rl.doctor import Report, examine
from torchstone.train import training
from torchstone.train.run import RunFolder
from torchstone.train.training import train

SOUND = {"loss": 0.0, "reward": 0.5, "reward_exact": 0.5, "reward_std": 0.3, "flat_groups": 0.3, "length": 9.0,
         "truncated": 0.1, "unscored": 0.0, "entropy": 1.0, "sampler_gap": 1e-5, "sampler_far": 0.0}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that has not begun, of answers that are right or wrong."""
    made = tiny.prompted(tmp_path, objective={"rewards": [{"kind": "exact"}]})
    return tiny.saved(tmp_path / "run", made).path


def report(folder: Path, rows: list[dict[str, Any]]) -> Report:
    valid = {"step": 0, "valid_loss": -0.1, "valid_reward": 0.1}
    written = [valid, *({"step": n + 1, **row} for n, row in enumerate(rows))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    return examine(RunFolder(folder))


def course(**ends: Any) -> list[dict[str, Any]]:
    """Twenty steps, in which the named metrics go from one value to the other after ten."""
    return [{**SOUND, **{name: pair[n >= 10] for name, pair in ends.items()}} for n in range(20)]


@pytest.mark.parametrize(
    ("ends", "state", "numbers"),
    [
        ({"flat_groups": (0.2, 0.9), "reward": (0.5, 0.97), "reward_exact": (0.5, 0.97)},
         "nearly all groups are right throughout", {"flat_groups": 0.9, "reward_exact": 0.97}),
        ({"flat_groups": (0.9, 0.9), "reward": (0.02, 0.02), "reward_exact": (0.02, 0.02)},
         "nearly all groups are wrong throughout", {"flat_groups": 0.9, "reward_exact": 0.02}),
        ({"flat_groups": (0.2, 0.9)},
         "nearly all groups score the same throughout", {"flat_groups": 0.9, "reward_exact": 0.5}),
        ({"truncated": (0.1, 0.7)}, "never stops", {"truncated": 0.7, "length": 9.0}),
        ({"sampler_gap": (0.2, 0.2)},
         "sampling and training distributions differ from the first steps on", {"sampler_gap": 0.2, "sampler_far": 0}),
        ({"sampler_far": (0.1, 0.0)},
         "sampling and training distributions differ from the first steps on",
         {"sampler_gap": 1e-5, "sampler_far": 0.1}),
        ({"entropy": (1.0, 0.05)}, "the entropy collapsed", {"before": 1.0, "now": 0.05}),
        ({"kl": (0.0, 1.5)}, "the policy is far from its reference", {"kl": 1.5}),
        ({"reward": (0.5, 0.3)}, "rewards fell below the first ones", {"before": 0.5, "now": 0.3}),
        ({"unscored": (0.0, 0.4)}, "many answers are not scored", {"unscored": 0.4, "truncated": 0.1}),
    ],
    ids=lambda x: x.replace(" ", "-") if isinstance(x, str) else "",
)  # fmt: skip
def test_a_state_is_named_with_its_numbers_and_what_to_try(
    folder: Path, ends: dict[str, Any], state: str, numbers: dict[str, float]
) -> None:
    (found,) = report(folder, course(**ends)).states
    assert found.state == state and found.numbers == pytest.approx(numbers) and found.advice


def test_what_is_usual_is_none(folder: Path) -> None:
    usual = course(reward=(0.5, 0.9), flat_groups=(0.3, 0.7), entropy=(1.0, 0.2), kl=(0.0, 0.3), truncated=(0.9, 0.1))
    found = report(folder, usual)
    assert not found.states and found.step == 20
    assert found.first == {"reward": 0.5, "reward_exact": 0.5} and found.last["reward"] == pytest.approx(0.9)
    assert str(found) == "nothing unusual up to step 20 (first reward 0.5, reward_exact 0.5; last reward 0.9, " + (
        "reward_exact 0.5)"
    )


def test_a_state_rests_on_the_last_steps_alone_and_several_are_a_line_each(folder: Path) -> None:
    rows = course(truncated=(0.9, 0.0), flat_groups=(1.0, 0.0), unscored=(0.9, 0.0))
    assert not report(folder, rows).states
    assert not report(folder, [*rows[:-1], {**rows[-1], "truncated": 1.0}]).states  # one step is none
    lines = str(report(folder, course(truncated=(0.9, 0.9), unscored=(0.0, 0.9)))).splitlines()
    assert lines[0].startswith("never stops (truncated 0.9, length 9): ") and len(lines) == 2


def test_rewards_that_differ_from_step_to_step_have_not_fallen(folder: Path) -> None:
    rows = [{**SOUND, "reward_std": 0.1, "reward": 0.2 + 0.6 * (n % 2 == 0)} for n in range(20)]
    assert not report(folder, rows).states  # 0.56 at first, 0.44 at last
    assert not report(folder, [{**SOUND, "reward": 0.9}] * 2 + [{**SOUND, "reward": 0.1}] * 2).states
    (found,) = report(folder, [{**row, "reward": row["reward"] - 2 * (n > 9)} for n, row in enumerate(rows)]).states
    assert found.state == "rewards fell below the first ones"


def test_one_step_is_enough_to_look_at(folder: Path) -> None:
    assert [each.state for each in report(folder, [{**SOUND, "truncated": 1.0}]).states] == ["never stops"]


def test_a_training_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]) -> None:
    """An untrained policy that hits no right sum, and whose answers have no room to end."""
    monkeypatch.setattr(training, "plot_curve", lambda *arguments: None)
    settings = {"steps": 2, "batch": 2, "device": "cpu", "threads": 1, "compile": "off"}
    own = {"rewards": [{"kind": "exact"}]}
    run = train(tiny.prompted(tmp_path, objective=own, trainer=settings), out=tmp_path / "run", quiet=True).path
    done = cli("rl", "doctor", run)
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert [line.partition(" (")[0] for line in lines] == ["nearly all groups are wrong throughout", "never stops"]
    assert "flat_groups 1, reward_exact 0" in lines[0]
    said = json.loads(cli("rl", "doctor", run, "--json").out)
    assert said["step"] == 2 and said["last"] == {"reward": 0.0, "reward_exact": 0.0}
    assert [each["state"] for each in said["states"]] == [line.partition(" (")[0] for line in lines]
    assert said["states"][0]["numbers"] == {"flat_groups": 1.0, "reward_exact": 0.0} and said["states"][0]["advice"]


def test_what_is_no_such_run_is_refused(folder: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    plain = tiny.saved(tmp_path / "plain", tiny.recipe(tmp_path)).path
    for run, match in (
        (tmp_path / "none", "none: no such run"),
        (plain, "plain: is no run of reinforcement learning; its objective is causal_lm"),
        (folder, "run: has no metrics; it stopped before its first step was logged"),
    ):
        with pytest.raises(TorchstoneError, match=match):
            examine(RunFolder(run))
        done = cli("rl", "doctor", run)
        assert done.status == 2 and match in done.err.replace("\n", " ")
