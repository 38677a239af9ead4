"""What ails a training by policy gradients, read off the metrics that it wrote: the usual states, each with the numbers
that it rests on and what to try."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import variance
from typing import Any

from torchstone.errors import TorchstoneError
from torchstone.rl.objectives.policy_gradient import PolicyGradientSpec
from torchstone.train.run import RunFolder

__all__ = ["Report", "State", "examine", "states_of"]

_EDGE = 5
"""Logged steps, at most, that the first and the last numbers are means over: one step's answers are few."""
_FLAT = 0.8
"""Share of answers in groups that teach nothing: beyond it most of what a step costs is spent for nothing."""
_RIGHT, _WRONG = 0.9, 0.1
"""Mean of the first reward, which rules give as 1 for right: above and below it flat groups are such throughout."""
_CUT = 0.5
"""Share of answers without an end; while it learns to stop a policy may have some, but not most."""
_GAP = 0.05
"""Nats between log-probabilities of training and sampling: float32 on both sides gives 1e-5, bfloat16 some 1e-2."""
_FAR = 0.05
"""Share of tokens whose two probabilities are more than a factor of 1.2 apart; of equal distributions none are."""
_COLLAPSED = 0.1
"""Part of its first entropy under which a policy writes one answer only, and groups no longer differ."""
_KL = 1.0
"""Nats a token to the reference: what is written is e times less likely there, a text of ten tokens never seen."""
_FALL, _SURE = 0.5, 3.0
"""Of the deviation inside groups, so that a fall is worth a line; and of the difference's standard error, for prompts
differ from step to step."""
_UNSCORED = 0.2
"""Share of answers that no rule could score: baselines then rest on a part that the answers' form has chosen."""


@dataclass(frozen=True)
class State:
    """Something that a run shows.

    Attributes:
        state: its name.
        numbers: the metrics that it rests on.
        advice: what to try.
    """

    state: str
    numbers: Mapping[str, float]
    advice: str

    def __str__(self) -> str:
        return f"{self.state} ({_said(self.numbers)}): {self.advice}"


@dataclass(frozen=True)
class Report:
    """States of a run.

    Attributes:
        step: the last step that was logged.
        first, last: rewards, means over the first and the last steps that were.
        states: what was found.
    """

    step: int
    first: Mapping[str, float]
    last: Mapping[str, float]
    states: Sequence[State]

    def dump(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        if self.states:
            return "\n".join(map(str, self.states))
        return f"nothing unusual up to step {self.step:,} (first {_said(self.first)}; last {_said(self.last)})"


def _said(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())


def examine(run: RunFolder) -> Report:
    """The states of a run.

    Raises:
        TorchstoneError: no run, one of another objective, or one that has logged no step.
    """
    run.require()
    objective = run.recipe.objective
    if not isinstance(objective, PolicyGradientSpec):
        raise TorchstoneError(f"{run.path}: is no run of reinforcement learning; its objective is {objective.kind}")
    rows = [row for row in run.metrics() if "loss" in row and "reward" in row]
    if not rows:
        raise TorchstoneError(f"{run.path}: has no metrics; it stopped before its first step was logged")
    edge = max(1, min(_EDGE, len(rows) // 2))
    first, last = _means(rows[:edge]), _means(rows[-edge:])
    names = [name for name in last if name == "reward" or (name.startswith("reward_") and name != "reward_std")]
    rewards = [row["reward"] for row in rows]
    noise = math.inf  # of two steps nobody knows
    if edge > 2:
        noise = math.sqrt((variance(rewards[:edge]) + variance(rewards[-edge:])) / edge)
    states = states_of(first, last, f"reward_{objective.rewards[0].kind}", noise)
    before, now = ({name: x[name] for name in names if name in x} for x in (first, last))
    return Report(rows[-1]["step"], before, now, states)


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found = {name: [row[name] for row in rows if isinstance(row.get(name), int | float)] for name in rows[-1]}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def states_of(first: Mapping[str, float], last: Mapping[str, float], main: str, noise: float) -> list[State]:
    """States that metrics show.

    Args:
        first, last: means over the first and the last steps.
        main: name of the reward that says whether an answer is right.
        noise: standard error of the difference between first and last rewards.
    """
    found: list[State] = []

    def say(state: str, advice: str, **numbers: float) -> None:
        found.append(State(state, numbers, advice))

    def of(row: Mapping[str, float], *names: str) -> dict[str, float]:
        return {name: row[name] for name in names if name in row}

    if last.get("flat_groups", 0) >= _FLAT:
        numbers, right = of(last, "flat_groups", main), last.get(main, 0.5)
        if right >= _RIGHT:
            say("nearly all groups are right throughout", "the prompts are too easy; take harder ones", **numbers)
        elif right <= _WRONG:
            say(
                "nearly all groups are wrong throughout",
                "the prompts are too hard; take easier ones, tune on good answers first, or raise objective.group",
                **numbers,
            )
        else:
            say(
                "nearly all groups score the same throughout",
                "the answers to a prompt hardly differ; raise objective.group or sampling.temperature, or score finer",
                **numbers,
            )
    if last.get("truncated", 0) >= _CUT:
        say(
            "never stops",
            "raise objective.sampling.max_new_tokens, tune first on answers that end, or keep truncated: zero",
            **of(last, "truncated", "length"),
        )
    if first.get("sampler_gap", 0) > _GAP or first.get("sampler_far", 0) > _FAR:
        say(
            "sampling and training distributions differ from the first steps on",
            "set trainer.precision: fp32, objective.correction: truncate, or with routed experts replay: rollout",
            **of(first, "sampler_gap", "sampler_far"),
        )
    if last.get("entropy", 0) < _COLLAPSED * first.get("entropy", 0):
        say(
            "the entropy collapsed",
            "lower optimizer.lr, raise the upper objective.clip, or set objective.kl.beta",
            before=first["entropy"],
            now=last["entropy"],
        )
    if last.get("kl", 0) > _KL:
        say(
            "the policy is far from its reference",
            "raise objective.kl.beta, lower optimizer.lr, or go on from a new reference",
            **of(last, "kl"),
        )
    least = _FALL * max(first.get("reward_std", 0), last.get("reward_std", 0))
    if first["reward"] - last["reward"] > max(least, _SURE * noise):
        say(
            "rewards fell below the first ones",
            "the learning rate is too high; lower optimizer.lr",
            before=first["reward"],
            now=last["reward"],
        )
    if last.get("unscored", 0) >= _UNSCORED:
        say(
            "many answers are not scored",
            "look at some by `torchstone rl sample`: rules gave None, answers were too long for a reward model, or "
            "cut with truncated: mask",
            **of(last, "unscored", "truncated"),
        )
    return found
