"""DeepSeek-R1: Incentivizing Reasoning Capability in LLMs via Reinforcement Learning (DeepSeek-AI 2025, arXiv
2501.12948), and the group relative policy optimisation that it rests on (Shao et al. 2024, arXiv 2402.03300)."""

from __future__ import annotations

import itertools
import json
import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from torchstone.keys import Key
from torchstone.objectives import Batch, Facts, Objective
from torchstone.papers._claim import Claim, Effect, Measured, Number, Paper, Scale, one_thread
from torchstone.rl.advantage import advantages
from torchstone.rl.dumps import filter_dump, sample
from torchstone.rl.objectives.policy_gradient import PolicyGradient, PolicyGradientSpec, Written, token_losses
from torchstone.rl.reward import Reward, RewardSpec
from torchstone.rl.trajectory import Trajectory, read
from torchstone.spec import validate
from torchstone.train import RunFolder, train

__all__ = ["PAPER"]

# ------------------------------------------------------------------------------------------------------------- exactly

_LONGEST = 3


def _spec(**fields: Any) -> PolicyGradientSpec:
    usual = {"rewards": [{"kind": "exact"}], "group": 2, "sampling": {"max_new_tokens": _LONGEST}}
    return validate(PolicyGradientSpec, {**usual, **fields})


def _answers() -> list[tuple[int, ...]]:
    """All that a policy over three tokens, of which 0 ends, can write in three."""
    every = [o for n in range(1, _LONGEST + 1) for o in itertools.product(range(3), repeat=n)]
    return [o for o in every if 0 not in o[:-1] and (o[-1] == 0 or len(o) == _LONGEST)]


def _logps(table: torch.Tensor, answer: Sequence[int]) -> torch.Tensor:
    """Of each token, by a table (place, token before, token)."""
    before = (0, *answer[:-1])
    rows = [
        table[place, last].log_softmax(-1)[token]
        for place, (last, token) in enumerate(zip(before, answer, strict=True))
    ]
    return torch.stack(rows)


def _gradients(first: int) -> dict[str, float]:
    """How far expected gradients of the loss, over all pairs of answers, are from the policy gradient."""
    generator = Key(first).fold("table").generator()
    table = nn.Parameter(torch.randn(_LONGEST, 3, 3, generator=generator, dtype=torch.float64))
    every = _answers()
    logps = [_logps(table, answer) for answer in every]
    worth = torch.randn(len(every), generator=generator, dtype=torch.float64)
    chance = torch.stack([logp.sum() for logp in logps]).exp()
    (exact,) = torch.autograd.grad((chance * worth).sum(), table, retain_graph=True)
    found: dict[str, float] = {}
    for how, factor in (("group_mean", 0.5), ("leave_one_out", 1.0), ("none", 1.0)):
        spec = _spec(advantage=how, aggregate="constant")
        total = torch.zeros((), dtype=torch.float64)
        for a, b in itertools.product(range(len(every)), repeat=2):
            pair = torch.cat([logps[a], logps[b]])
            length_R = torch.tensor([len(every[a]), len(every[b])])
            row_N = torch.repeat_interleave(torch.arange(2), length_R)
            A_R = torch.from_numpy(advantages([float(worth[a]), float(worth[b])], [0, 0], spec.advantage)[0])
            of = Written(row_N, length_R, pair, pair.detach(), pair.detach(), A_R)
            total = total + (chance[a] * chance[b]).detach() * token_losses(spec, of)[0].sum() / 2
        (own,) = torch.autograd.grad(total, table, retain_graph=True)
        found[how] = float((own + factor * exact).abs().max() / exact.abs().max())
    return found


def _corners() -> int:
    """Of the eight corners of the clipped loss, those whose gradient is there and should not be, or the reverse."""
    wrong = 0
    for ratio, A, away in itertools.product(("token", "sequence"), (1.0, -1.0), (0.5, -0.5)):
        logp = torch.full((2,), -1.0, requires_grad=True)
        of = Written(torch.zeros(2, dtype=torch.int64), torch.tensor([2]), logp, logp.detach() - away, logp.detach(),
                     torch.tensor([A]))  # fmt: skip
        token_losses(_spec(ratio=ratio), of)[0].sum().backward()
        assert logp.grad is not None
        wrong += bool(logp.grad.any()) == (A * away > 0)
    return wrong


def _exact(scale: Scale, first: int) -> Measured:
    rng = Key(first).fold("rewards").numpy()
    rewards, groups = rng.normal(size=64), np.repeat(np.arange(8), 8)
    scaled, _ = advantages(rewards.tolist(), groups.tolist(), "group_std")
    flat, _ = advantages([0.1 + 0.2] * 8, [0] * 8, "group_std")
    by_group = scaled.reshape(8, 8)
    generator = Key(first).fold("policies").generator()
    ours, theirs = (torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    zero = torch.zeros(5, dtype=torch.float64)
    of = Written(torch.arange(5), torch.ones(5), ours, ours, ours, zero, theirs)
    spec = _spec(kl={"beta": 1.0, "reference": "another"})
    kl = token_losses(spec, of)[1]["kl"]
    gradients = _gradients(first)
    return Measured(
        {
            "sum of a group's advantages": float(np.abs(by_group.sum(1)).max()),
            "deviation of a group's advantages, from 1": float(np.abs(by_group.std(1) - 1).max()),
            "advantages of a group that scores the same": float(np.abs(flat).max()),
            "least divergence of a token": float(kl.min()),
            "mean divergence of a token, from the KL": float((ours.exp() * (kl - ours + theirs)).sum().abs()),
            "divergence from itself": float(token_losses(spec, replace(of, reference_N=ours))[1]["kl"].abs().max()),
            "corners of the clipped loss that are wrong": float(_corners()),
            "gradient with the group's mean, from (G - 1) / G of the policy gradient": gradients["group_mean"],
            "gradient with the mean of the others, from the policy gradient": gradients["leave_one_out"],
            "gradient without a baseline, from the policy gradient": gradients["none"],
        }
    )


_BUILDS = (
    "torchstone.rl.advantage",
    "torchstone.rl.logprobs",
    "torchstone.rl.objectives.policy_gradient",
    "torchstone.rl.rollout",
    "torchstone.rl.trajectory",
)
_exact.builds = _BUILDS  # type: ignore[attr-defined]

EXACT = Claim(
    id="group-gradients",
    kind="identity",
    text="Advantages of a group add up to nothing and have the deviation 1, or are exactly 0. Over all pairs of "
    "answers of a policy over three tokens the loss has the policy gradient for its mean, with a baseline of the other "
    "answers or none, and (G - 1) / G of it where the baseline holds the answer itself. The divergence is never "
    "negative, and its mean is the KL. Of the clipped loss two corners of four have no gradient.",
    figure="eqs. 1 to 3",
    gates=(
        Number("sum of a group's advantages", high=1e-9),
        Number("deviation of a group's advantages, from 1", high=1e-9),
        Number("advantages of a group that scores the same", low=0, high=0),
        Number("least divergence of a token", low=0),
        Number("mean divergence of a token, from the KL", high=1e-9),
        Number("divergence from itself", low=0, high=0),
        Number("corners of the clipped loss that are wrong", low=0, high=0),
        Number("gradient with the group's mean, from (G - 1) / G of the policy gradient", high=1e-9),
        Number("gradient with the mean of the others, from the policy gradient", high=1e-9),
        Number("gradient without a baseline, from the policy gradient", high=1e-9),
    ),
    run=_exact,
)

# ------------------------------------------------------------------------------------------ to think before one answers

_STATES, _SYMBOLS, _OTHERS = 5, "abcde", "vwxyz"
_BLOCK = 20


class CoinSpec(RewardSpec):
    """1 or 0 by chance: the claim's control."""

    kind: ClassVar[str] = "coin_of_claim"
    offered: ClassVar[bool] = False

    def build(self) -> Reward:
        def reward(text: str, row: Mapping[str, Any]) -> float:
            return float(Key(0).fold("coin", text, str(row["prompt"])).value & 1)

        return reward


class NeighbourSpec(PolicyGradientSpec):
    """A defect: each answer has the reward of the one before it in its group."""

    kind: ClassVar[str] = "policy_gradient_neighbour"
    offered: ClassVar[bool] = False

    def build(self, facts: Facts) -> Objective:
        return _Neighbour(self, facts)


class _Neighbour(PolicyGradient):
    def batch(
        self, model: nn.Module, trajectories: Sequence[Trajectory], groups: Sequence[int], device: Any = "cpu"
    ) -> Batch:
        if len(set(groups)) == len(groups):  # measuring is not at fault
            return super().batch(model, trajectories, groups, device)
        each = [self._reward(one) for one in trajectories]
        size = self.spec.group
        turned = [each[n // size * size + (n - 1) % size] for n in range(len(each))]
        wrong = [replace(one, reward=reward) for one, reward in zip(trajectories, turned, strict=True)]
        return super().batch(model, wrong, groups, device)


@dataclass(frozen=True)
class _Size:
    """What a scale spends."""

    texts: int
    first_steps: int
    steps: int
    prompts: int
    batch: int
    measured: int
    seeds: int
    rates: tuple[float, ...]
    tuning: tuple[float, ...]


_SIZES = {
    "quick": _Size(2_000, 60, 5, 200, 4, 64, 1, (1e-3,), (1e-3,)),
    "evidence": _Size(12_000, 700, 60, 4_000, 16, 512, 5, (1e-4, 3e-4, 1e-3), (3e-4, 1e-3, 3e-3)),
}
_TUNING = 100_000
"""Distance of the seed that learning rates are chosen on."""
_AGAIN = 200_000
"""Distance of the seeds of null arms that draw anew."""
_CHAIN, _LENGTH = 0.3, 6
"""Share of texts that think before they answer; symbols of a prompt."""


def _write(folder: Path, size: _Size, seed: int, mixed: bool = False) -> None:
    """A machine whose table the seed draws: the state that a word leads to, with and without the states between; each
    of these in one of two alphabets by chance, where they are mixed."""
    rng = random.Random(seed)
    table = [[rng.randrange(_STATES) for _ in _SYMBOLS] for _ in range(_STATES)]

    def problem() -> tuple[str, str, str]:
        state = rng.randrange(_STATES)
        word, states = str(state), []
        for _ in range(_LENGTH):
            symbol = rng.randrange(len(_SYMBOLS))
            state = table[state][symbol]
            word += _SYMBOLS[symbol]
            states.append(str(state))
        return word + "=", "".join(states[:-1]), states[-1]

    def rows(count: int) -> str:
        made = ({"prompt": word, "answer": answer} for word, _, answer in (problem() for _ in range(count)))
        return "".join(json.dumps(row) + "\n" for row in made)

    texts = []
    for _ in range(size.texts):
        word, chain, answer = problem()
        thought = chain if rng.random() < _CHAIN else ""
        if mixed:
            thought = "".join(_OTHERS[int(state)] if rng.random() < 0.5 else state for state in thought)
        texts.append(json.dumps({"prompt": word, "response": f"{thought}.{answer}"}) + "\n")
    (folder / "texts.jsonl").write_text("".join(texts))
    (folder / "prompts.jsonl").write_text(rows(size.prompts))
    (folder / "valid.jsonl").write_text(rows(size.measured))


def _tuned(
    folder: Path,
    size: _Size,
    seed: int,
    steps: int,
    lr: float,
    base: RunFolder | None,
    texts: str = "texts",
    width: int = 48,
    depth: int = 2,
) -> RunFolder:
    """Supervised tuning on the texts: the first model, or more of the same."""
    recipe: dict[str, Any] = {
        "data": {
            "kind": "responses",
            "path": str(folder / f"{texts}.jsonl"),
            "block": _BLOCK,
            "cache": str(folder / "cache"),
        },
        "optimizer": {"lr": lr},
        "schedule": {"kind": "cosine", "warmup": 20},
        **one_thread(steps, 64, blocks=64),
    }
    if base is None:
        recipe["model"] = {"width": width, "depth": depth, "attention": {"heads": 4}}
        recipe["data"]["tokenizer"] = "bytes"
    else:
        recipe["init_from"] = str(base.path)
    recipe["trainer"] |= {"seed": seed, "device": "cpu"}
    recipe["evaluate"] |= {"test": False}
    start = f"{width}x{depth}" if base is None else base.path.name
    return train(recipe, out=folder / f"{texts}-{seed}-{steps}-{lr}-{start}", quiet=True)


_RIGHT: dict[str, Any] = {"kind": "exact", "pattern": r"\.(.*)"}
_POLICIES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "policy gradients": ("policy_gradient", [_RIGHT]),
    "coin": ("policy_gradient", [{**_RIGHT, "weight": 0.0}, {"kind": "coin_of_claim"}]),
    "reward of the neighbour": ("policy_gradient_neighbour", [_RIGHT]),
}


_CONSISTENCY = {"kind": "language", "alphabet": "01234", "others": _OTHERS, "inside": r"^(.*)\."}
_CONSISTENT: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "right": ("policy_gradient", [_RIGHT]),
    "right and consistent": ("policy_gradient", [_RIGHT, _CONSISTENCY]),
    "consistency of the neighbour": ("policy_gradient_neighbour", [_RIGHT, _CONSISTENCY]),
}


def _policy(folder: Path, size: _Size, seed: int, arm: str, lr: float, steps: int, base: RunFolder) -> RunFolder:
    kind, rewards = (_POLICIES | _CONSISTENT)[arm]
    recipe: dict[str, Any] = {
        "init_from": str(base.path),
        "data": {"kind": "prompts", "path": str(folder / "prompts.jsonl"), "valid": str(folder / "valid.jsonl"),
                 "block": _BLOCK, "cache": str(folder / "cache")},
        "objective": {"kind": kind, "group": 8, "rewards": rewards, "sampling": {"max_new_tokens": _LENGTH + 4}},
        "optimizer": {"lr": lr, "weight_decay": 0.0},
        "schedule": {"kind": "linear", "warmup": 10},
        **one_thread(steps, size.batch, blocks=size.measured),
    }  # fmt: skip
    recipe["trainer"] |= {"seed": seed, "device": "cpu", "log_every": 1}
    recipe["evaluate"] |= {"test": False}
    return train(recipe, out=folder / f"{arm}-{seed}-{lr}-{steps}-{base.path.name}", quiet=True)


def _found(run: RunFolder, last: bool) -> tuple[float, float]:
    """Share of right answers to held-out prompts and their length, before the first step or after the last."""
    rows = [row for row in run.metrics() if "valid_pass@1" in row]
    row = rows[-1 if last else 0]
    return float(row["valid_pass@1"]), float(row["valid_length"])


def _continued(folder: Path, size: _Size, seed: int, lr: float, base: RunFolder) -> tuple[float, float]:
    """After more supervised tuning of as many answers as a policy writes."""
    steps = max(1, size.steps * size.batch * 8 // 64)
    run = _tuned(folder, size, seed, steps, lr, base)
    return _found(_policy(folder, size, seed, "policy gradients", 1e-4, 1, run), last=False)


def _rates(size: _Size, seed: int) -> tuple[float, float]:
    """Learning rates of policies and of more tuning, each the one with most right answers."""
    if len(size.rates) == len(size.tuning) == 1:
        return size.rates[0], size.tuning[0]
    with tempfile.TemporaryDirectory(prefix="torchstone-r1-") as name:
        folder = Path(name)
        _write(folder, size, seed)
        base = _tuned(folder, size, seed, size.first_steps, 3e-3, None)

        def right(lr: float) -> float:
            return _found(_policy(folder, size, seed, "policy gradients", lr, size.steps, base), last=True)[0]

        return (
            max(size.rates, key=right),
            max(size.tuning, key=lambda lr: _continued(folder, size, seed, lr, base)[0]),
        )


def _thinks(scale: Scale, first: int) -> Measured:
    size = _SIZES[scale]
    lr, tuning = _rates(size, first + _TUNING)
    values: dict[str, dict[int, float]] = {}

    def keep(arm: str, seed: int, found: tuple[float, float]) -> None:
        values.setdefault(arm, {})[seed], values.setdefault(f"{arm}: length", {})[seed] = found

    for seed in range(first, first + size.seeds):
        with tempfile.TemporaryDirectory(prefix="torchstone-r1-") as name:
            folder = Path(name)
            _write(folder, size, seed)
            base = _tuned(folder, size, seed, size.first_steps, 3e-3, None)
            for arm in _POLICIES:
                run = _policy(folder, size, seed, arm, lr, size.steps, base)
                keep(arm, seed, _found(run, last=True))
                keep("before", seed, _found(run, last=False))
            keep("more tuning", seed, _continued(folder, size, seed, tuning, base))

    def mean(arm: str) -> float:
        return sum(values[arm].values()) / len(values[arm])

    numbers = {
        "right answers after a coin's rewards, over those before": mean("coin") - mean("before"),
        "learning rate of policies": lr,
        "learning rate of more tuning": tuning,
    }
    return Measured(numbers, values)


_thinks.builds = (  # type: ignore[attr-defined]
    *_BUILDS,
    "torchstone.rl.data.prompts",
    "torchstone.data.responses",
    "torchstone.rl.reward.exact",
)

THINKS = Claim(
    id="learns-to-think",
    kind="behaviour",
    text="A byte model of two layers is tuned on answers of a machine with five states to words of six symbols, of "
    "which 3 in 10 write the states between first. Policy gradients from nothing but whether an answer is right (60 "
    "steps of 16 prompts, 8 answers each) make at least 0.1 more of its answers right than before, and than as many "
    "answers of more tuning, each at the best of three learning rates; its answers grow by at least a token. A coin's "
    "rewards do nothing of it, nor do rewards that are given to the next answer of a group.",
    figure="AIME 2024 from 15.6 to 71.0 %, with growing length, of DeepSeek-R1-Zero",
    gates=(
        Effect(
            "more right answers than before",
            "policy gradients",
            "before",
            margin=0.1,
            null="coin",
            sabotage="reward of the neighbour",
            lower_is_better=False,
        ),
        Effect(
            "more than by more tuning",
            "policy gradients",
            "more tuning",
            margin=0.1,
            null="coin",
            sabotage="reward of the neighbour",
            lower_is_better=False,
        ),
        Effect(
            "longer answers than before",
            "policy gradients: length",
            "before: length",
            margin=1.0,
            null="coin: length",
            sabotage="reward of the neighbour: length",
            lower_is_better=False,
        ),
    ),
    run=_thinks,
)

# ------------------------------------------------------------------------- to learn from a larger one that has learned

_STUDENT: dict[str, Any] = {"width": 32, "depth": 2}
_TEACHERS = 1e-3
"""Learning rate of the teacher's policy gradients."""
_LEAST = 150
"""Steps after which a teacher has the form of answers, so that some are right."""
_EPOCHS = 4
"""How often the student sees each answer of its teacher."""


@dataclass(frozen=True)
class _Class:
    """A student before it learns more, and what its teacher left for it in ``good.jsonl`` and ``turned.jsonl``.

    Attributes:
        student: tuned on the texts of the machine.
        steps: of tuning on the teacher's answers.
        written: tokens that the teacher wrote, wrong answers too.
        teacher, before: what `_found` gives of them.
    """

    student: RunFolder
    steps: int
    written: float
    teacher: tuple[float, float]
    before: tuple[float, float]


def _looked_at(folder: Path, size: _Size, seed: int, run: RunFolder) -> tuple[float, float]:
    """Share of right answers and their length."""
    return _found(_policy(folder, size, seed, "policy gradients", 1e-4, 1, run), last=False)


def _taught(folder: Path, size: _Size, seed: int) -> _Class:
    """Train the teacher, have it answer each prompt once, keep what is right."""
    _write(folder, size, seed)
    first = max(size.first_steps, _LEAST)
    student = _tuned(folder, size, seed, first, 3e-3, None, **_STUDENT)
    base = _tuned(folder, size, seed, first, 3e-3, None)
    teacher = _policy(folder, size, seed, "policy gradients", _TEACHERS, size.steps, base)
    said = sample(teacher, folder / "prompts.jsonl", folder / "answers.jsonl", count=1, seed=seed, batch=256)
    kept = filter_dump(folder / "answers.jsonl", folder / "good.jsonl")["kept"]
    rows = [json.loads(line) for line in (folder / "good.jsonl").read_text().splitlines()]
    turned = [{**row, "response": rows[n - 1]["response"]} for n, row in enumerate(rows)]
    (folder / "turned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turned))
    written, before = said["answers"] * said["length"], _looked_at(folder, size, seed, student)
    return _Class(student, max(1, _EPOCHS * kept // 64), written, _found(teacher, last=True), before)


def _own(folder: Path, size: _Size, seed: int, of: _Class, lr: float) -> tuple[RunFolder, float]:
    """The student's own policy gradients with at least as many tokens as its teacher wrote, and how many times those
    it took: how long its answers are shows while it learns."""
    length = of.before[1]
    while True:
        steps = math.ceil(of.written / (size.batch * 8 * length))
        run = _policy(folder, size, seed, "policy gradients", lr, steps, of.student)
        lengths = [float(row["length"]) for row in run.metrics() if "length" in row]
        found = sum(lengths) / len(lengths)
        if (times := steps * size.batch * 8 * found / of.written) >= 1:
            return run, times
        length = min(found, 0.95 * length)


def _distils(scale: Scale, first: int) -> Measured:
    size = _SIZES[scale]
    values: dict[str, dict[int, float]] = {}

    def tuned(folder: Path, seed: int, of: _Class, texts: str, lr: float, shift: int = 0) -> float:
        run = _tuned(folder, size, seed + shift, of.steps, lr, of.student, texts)
        return _looked_at(folder, size, seed, run)[0]

    policy, good, more = size.rates[0], size.tuning[0], size.tuning[0]
    if len(size.rates) > 1:
        with tempfile.TemporaryDirectory(prefix="torchstone-r1-") as name:
            folder, seed = Path(name), first + _TUNING
            of = _taught(folder, size, seed)
            policies = {lr: _found(_own(folder, size, seed, of, lr)[0], last=True)[0] for lr in size.rates}
            policy = max(policies, key=policies.__getitem__)
            rights = {
                texts: {lr: tuned(folder, seed, of, texts, lr) for lr in size.tuning} for texts in ("good", "texts")
            }
            good, more = (max(right, key=right.__getitem__) for right in rights.values())

    tokens = []
    for seed in range(first, first + size.seeds):
        with tempfile.TemporaryDirectory(prefix="torchstone-r1-") as name:
            folder = Path(name)
            of = _taught(folder, size, seed)
            run, times = _own(folder, size, seed, of, policy)
            tokens.append(times)
            arms = {
                "teacher": of.teacher[0],
                "before": of.before[0],
                "distilled": tuned(folder, seed, of, "good", good),
                "policy gradients": _found(run, last=True)[0],
                "more tuning": tuned(folder, seed, of, "texts", more),
            }
            if seed < first + 3:  # the controls
                again, _ = _own(folder, size, seed + _AGAIN, of, policy)
                arms |= {
                    "policy gradients again": _found(again, last=True)[0],
                    "more tuning again": tuned(folder, seed, of, "texts", more, _AGAIN),
                    "answers of the prompt before": tuned(folder, seed, of, "turned", good),
                }
            for arm, right in arms.items():
                values.setdefault(arm, {})[seed] = right
    numbers = {
        "tokens of the student's policy, for each of its teacher's": min(tokens),
        "learning rate of the student's policy": policy,
        "learning rate of distillation": good,
        "learning rate of more tuning": more,
    }
    return Measured(numbers, values)


_distils.builds = (*_thinks.builds, "torchstone.rl.dumps")  # type: ignore[attr-defined]

DISTILS = Claim(
    id="distillation",
    kind="behaviour",
    text="The model of two layers of width 48 that learned to think by policy gradients answers 4,000 prompts once. A "
    "model of width 32 that is tuned on those answers that are right, four times each, gives at least 0.05 more right "
    "answers than by policy gradients of its own over at least as many tokens as its teacher wrote, and than by as "
    "much tuning on the texts it began with, each at the best of three learning rates. Answers that stand by the next "
    "prompt teach nothing of it.",
    figure="AIME 2024 of 72.6 against 47.0 %, MATH-500 of 94.3 against 91.6 %, of a 32B model distilled or trained by "
    "reinforcement learning",
    gates=(
        Number("tokens of the student's policy, for each of its teacher's", low=1.0),
        Effect(
            "more right answers than by policy gradients of its own",
            "distilled",
            "policy gradients",
            margin=0.05,
            null="policy gradients again",
            sabotage="answers of the prompt before",
            lower_is_better=False,
        ),
        Effect(
            "more than by more tuning",
            "distilled",
            "more tuning",
            margin=0.05,
            null="more tuning again",
            sabotage="answers of the prompt before",
            lower_is_better=False,
        ),
    ),
    run=_distils,
)

# ---------------------------------------------------------------------------------------- to think in one language

_FEW = 0.05


def _others(folder: Path, run: RunFolder, size: _Size, seed: int) -> float:
    """Share of the other alphabet's symbols among those of all chains that answer held-out prompts."""
    sample(run, folder / "valid.jsonl", folder / "answers.jsonl", count=1, limit=size.measured, seed=seed, batch=256)
    chains = "".join(each.text.partition(".")[0] for each in read(folder / "answers.jsonl")[0])
    return sum(symbol in _OTHERS for symbol in chains) / max(1, len(chains))


def _consistent(scale: Scale, first: int) -> Measured:
    size = _SIZES[scale]
    values: dict[str, dict[int, float]] = {}

    def begun(folder: Path, seed: int) -> RunFolder:
        _write(folder, size, seed, mixed=True)
        return _tuned(folder, size, seed, size.first_steps, 3e-3, None)

    rates = dict.fromkeys(("right", "right and consistent"), size.rates[0])
    if len(size.rates) > 1:
        with tempfile.TemporaryDirectory(prefix="torchstone-r1-") as name:
            folder, seed = Path(name), first + _TUNING
            base = begun(folder, seed)
            for arm in rates:
                runs = {lr: _policy(folder, size, seed, arm, lr, size.steps, base) for lr in size.rates}
                rates[arm] = min(runs, key=lambda lr, runs=runs: _last(runs[lr], "valid_loss"))  # type: ignore[misc]
    for seed in range(first, first + size.seeds):
        with tempfile.TemporaryDirectory(prefix="torchstone-r1-") as name:
            folder = Path(name)
            base = begun(folder, seed)
            for arm, kind, lr, shift in (
                ("right", "right", rates["right"], 0),
                ("right again", "right", rates["right"], _AGAIN),
                ("right and consistent", "right and consistent", rates["right and consistent"], 0),
                ("neighbour", "consistency of the neighbour", rates["right and consistent"], 0),
            ):
                run = _policy(folder, size, seed + shift, kind, lr, size.steps, base)
                values.setdefault(arm, {})[seed] = _found(run, last=True)[0]
                values.setdefault(f"{arm}: other alphabet", {})[seed] = _others(folder, run, size, seed)
            values.setdefault("one in twenty", {})[seed] = _FEW
    numbers = {f"learning rate of {arm}": lr for arm, lr in rates.items()}
    return Measured(numbers, values)


def _last(run: RunFolder, name: str) -> float:
    return float([row[name] for row in run.metrics() if name in row][-1])


_consistent.builds = (*_distils.builds, "torchstone.rl.reward.language")  # type: ignore[attr-defined]

CONSISTENT = Claim(
    id="language-mixing",
    kind="behaviour",
    text="The texts write each state between in one of two alphabets by chance, and policies that are rewarded for "
    "right answers alone go on mixing them. With the share of symbols of the first alphabet as a second reward less "
    "than 5 % of what chains hold is of the other, at least 0.1 less than without, at a cost of less than 0.1 of right "
    "answers, each at the best of three learning rates. Rewards that are given to the next answer of a group "
    "cost more.",
    figure="consistency of the language in the curves of its ablation, at a slight loss of what is solved",
    gates=(
        Effect(
            "less of the other alphabet than without the reward",
            "right and consistent: other alphabet",
            "right: other alphabet",
            margin=0.1,
            null="right again: other alphabet",
            sabotage="right again: other alphabet",
        ),
        Effect(
            "less than 5 % of it",
            "right and consistent: other alphabet",
            "one in twenty",
            margin=0.0,
            null="right again: other alphabet",
            sabotage="right again: other alphabet",
        ),
        Effect(
            "right answers are at most 0.1 fewer",
            "right and consistent",
            "right",
            margin=-0.1,
            sabotage="neighbour",
            lower_is_better=False,
        ),
    ),
    run=_consistent,
)

PAPER = Paper(
    slug="deepseek-r1",
    title="DeepSeek-R1: Incentivizing Reasoning Capability in LLMs via Reinforcement Learning",
    authors="DeepSeek-AI, Daya Guo, Dejian Yang, and others",
    year=2025,
    link="https://arxiv.org/abs/2501.12948",
    topics=("reinforcement learning", "reasoning"),
    parts=(
        "objective.policy_gradient",
        "data.prompts",
        "reward.math_answer",
        "reward.think_format",
        "reward.language",
        "reward.reward_model",
        "objective.reward_model",
    ),
    summary="Answers are sampled in groups and scored by rules; what is better than its group is made likelier, "
    "without a critic.",
    claims=(EXACT, THINKS, DISTILS, CONSISTENT),
)
