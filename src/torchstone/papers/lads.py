"""Lossless Anti-Distillation Sampling (Diao et al. 2026, arXiv 2605.18829)."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import chi2_contingency, chisquare

from torchstone.data._sides import sides
from torchstone.data.responses import Responses
from torchstone.generate import Completion, Engine
from torchstone.generate.noise import NoiseSource, Request
from torchstone.generate.noise.lads import LadsNoise, seed_of
from torchstone.generate.noise.seeded import SeededNoise
from torchstone.generate.sampling import History, Sampling
from torchstone.keys import Key
from torchstone.objectives.causal_lm import CausalLM
from torchstone.papers._claim import Claim, Effect, Measured, Number, Paper, Scale, one_thread
from torchstone.train import RunFolder, train

__all__ = ["PAPER"]

_SAMPLING = Sampling()
_AGAIN = 100_000
"""Distance of the seeds that a null arm draws anew."""


def _answers(noise: NoiseSource, requests: Sequence[Request], logits_NV: torch.Tensor, how: Sampling) -> np.ndarray:
    """The first token of each request."""
    return how.choose(logits_NV, History(requests, 0, [[0]] * len(requests)), noise).ids_B.numpy()


def _key(seed: int) -> bytes:
    return hashlib.sha256(f"claims {seed}".encode()).digest()


def _exact(scale: Scale, first: int) -> Measured:
    """Smallest p-values over seeds and settings, and largest differences."""
    visits = 20_000 if scale == "quick" else 200_000
    settings = (Sampling(), Sampling(temperature=0.6), Sampling(temperature=1.5, top_k=3))
    logits, numbers = (
        torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5]),
        {"frequencies: p": 1.0, "one answer after another: p": 1.0},
    )
    for seed in range(first, first + 3):
        noise = LadsNoise(_key(seed), lambda prompt: prompt)
        requests = noise.visit(["u"] * visits, ["a question"] * visits)
        for how in settings:
            drawn = _answers(noise, requests, logits.expand(visits, -1), how)
            wanted = how.adjust(logits[None]).double().softmax(-1)[0].numpy() * visits
            there = np.flatnonzero(wanted)
            counts = np.bincount(drawn, minlength=5)
            name = "frequencies: p"
            numbers[name] = min(
                numbers[name], chisquare(counts[there], wanted[there]).pvalue if counts[there].sum() == visits else 0.0
            )
            pairs = np.zeros((5, 5))
            np.add.at(pairs, (drawn[:-1], drawn[1:]), 1)
            name = "one answer after another: p"
            numbers[name] = min(numbers[name], chi2_contingency(pairs[np.ix_(there, there)]).pvalue)
    worst, below = 0.0, 0.0
    generator = Key(first).fold("agreement").numpy()
    for _ in range(5):
        p, q = (generator.dirichlet(np.ones(6)) for _ in range(2))
        one, other = (
            _answers(noise, requests, torch.from_numpy(np.log(x)).expand(visits, -1), _SAMPLING) for x in (p, q)
        )
        share = 1 / (np.maximum(p[None] / p[:, None], q[None] / q[:, None])).sum(1)
        agree = float(share.sum())
        off = abs(float((one == other).mean()) - agree) / math.sqrt(agree * (1 - agree) / visits)
        worst = max(worst, off)
        apart = np.abs(p - q).sum() / 2
        below = max(below, float((1 - apart) / (1 + apart)) - agree)
    numbers["agreement of two distributions, standard errors from the formula"] = worst
    numbers["lower bound of agreement, above it by"] = below
    users = LadsNoise(_key(first), lambda prompt: prompt)
    names = [users.visit([user], ["the same question"])[0] for user in ("ann", "bob", "somebody else")]
    message = (17).to_bytes(8, "little") + b"the same question" + (0).to_bytes(8, "little")
    known = hmac.new(_key(first), message, hashlib.sha256).hexdigest()
    numbers["users with a seed of their own for a first visit"] = len(set(names)) - 1
    numbers["seed of a keyed hash of bucket and count"] = float(
        names[0] == known == seed_of(_key(first), "the same question", 0).hex()
    )
    return Measured(numbers)


_BUILDS = ("torchstone.generate.noise.lads", "torchstone.generate.noise.seeded", "torchstone.generate.sampling")
_exact.builds = (*_BUILDS, "torchstone.ops.noise.reference")  # type: ignore[attr-defined]

EXACT = Claim(
    id="exact",
    kind="identity",
    text="Answers to one user follow the model's distribution and do not depend on one another, also with truncation "
    "and other temperatures. The seed is a keyed hash of bucket and count, alike for all users. Answers of two "
    "distributions under shared noise agree as often as the formula of Gumbel coupling says.",
    figure="every user gets independent exact samples",
    gates=(
        Number("frequencies: p", low=1e-4),
        Number("one answer after another: p", low=1e-4),
        Number("agreement of two distributions, standard errors from the formula", high=4.5),
        Number("lower bound of agreement, above it by", high=1e-9),
        Number("users with a seed of their own for a first visit", low=0, high=0),
        Number("seed of a keyed hash of bucket and count", low=1, high=1),
    ),
    run=_exact,
)

# ------------------------------------------------------------------------------------------------------- many accounts

_BUCKETS, _VOCABULARY, _VISITS, _ACCOUNTS = 40, 20, 10, 16
_QUESTIONS = [f"question {b}" for b in range(_BUCKETS) for _ in range(_VISITS)]


def _harvest(noise: NoiseSource, requests: Sequence[Request], teacher_BV: np.ndarray) -> np.ndarray:
    """Answers (B, r) to all questions."""
    logits = torch.from_numpy(np.log(np.repeat(teacher_BV, _VISITS, 0)))
    return _answers(noise, requests, logits, _SAMPLING).reshape(_BUCKETS, _VISITS)


def _sources(seed: int) -> dict[str, Callable[[str], tuple[NoiseSource, Sequence[Request]]]]:
    """By arm: what a user's questions are answered with."""

    def visits(noise: LadsNoise, user: str) -> tuple[NoiseSource, Sequence[Request]]:
        return noise, noise.visit([user] * len(_QUESTIONS), _QUESTIONS)

    def own(seed: int, user: str) -> tuple[NoiseSource, Sequence[Request]]:
        return SeededNoise(seed), [f"{user} {at}" for at in range(len(_QUESTIONS))]

    shared = LadsNoise(_key(seed), lambda prompt: prompt)
    return {
        "shared": lambda user: visits(shared, user),
        "shared, user in the seed": lambda user: visits(LadsNoise(_key(seed), lambda prompt: f"{user} {prompt}"), user),
        "independent": lambda user: own(seed, user),
        "independent again": lambda user: own(seed + _AGAIN, user),
    }


def _divergence(teacher_BV: np.ndarray, answers: Sequence[np.ndarray]) -> float:
    """Log of the mean KL(teacher || student) in nats, of a student that counts answers and adds a half to each."""
    counts_BV = np.zeros_like(teacher_BV)
    for answer_Br in answers:
        for b, row in enumerate(answer_Br):
            for token, count in Counter(row.tolist()).items():
                counts_BV[b, token] += count
    student_BV = (counts_BV + 0.5) / (counts_BV + 0.5).sum(1, keepdims=True)
    return math.log((teacher_BV * np.log(teacher_BV / student_BV)).sum(1).mean())


def _accounts(scale: Scale, first: int) -> Measured:
    values: dict[str, dict[int, float]] = {}
    for seed in range(first, first + (5 if scale == "quick" else 20)):
        teacher_BV = Key(seed).fold("teacher").numpy().dirichlet(np.ones(_VOCABULARY), _BUCKETS).clip(1e-9)
        teacher_BV /= teacher_BV.sum(1, keepdims=True)
        for arm, source in _sources(seed).items():
            harvest = [_harvest(*source(f"user {n}"), teacher_BV) for n in range(_ACCOUNTS)]
            for m in (1, 8, 16):
                values.setdefault(f"{arm}, {m} accounts", {})[seed] = _divergence(teacher_BV, harvest[:m])
                # who knows that accounts repeat one another keeps one of them
                once = list({answer.tobytes(): answer for answer in harvest[:m]}.values())
                values.setdefault(f"{arm}, {m} accounts, repeats left out", {})[seed] = _divergence(teacher_BV, once)
    return Measured({}, values)


_accounts.builds = _BUILDS  # type: ignore[attr-defined]

ACCOUNTS = Claim(
    id="accounts-of-no-use",
    kind="behaviour",
    text="A student of categorical answers from 8 accounts, 10 to each of 40 questions, is at least 4 times as far "
    "from its teacher (KL) when accounts share noise as when they do not, and at least 2.5 times when it leaves out "
    "repeats. Where noise is independent, 16 accounts bring it nearer by at least the 0.6th power of their number.",
    figure="m accounts give the independent noise of one; the gain of distillation falls from 29.8 to 11.2 points",
    gates=(
        Effect(
            "8 accounts: four times as far",
            "shared, 8 accounts",
            "independent, 8 accounts",
            margin=math.log(4),
            null="independent again, 8 accounts",
            sabotage="shared, user in the seed, 8 accounts",
            lower_is_better=False,
        ),
        Effect(
            "repeats left out: 2.5 times as far",
            "shared, 8 accounts, repeats left out",
            "independent, 8 accounts",
            margin=math.log(2.5),
            null="independent again, 8 accounts",
            sabotage="shared, user in the seed, 8 accounts",
            lower_is_better=False,
        ),
        Effect(
            "without sharing, accounts help",
            "independent, 16 accounts",
            "independent, 1 accounts",
            margin=0.6 * math.log(16),
            null="independent again, 1 accounts",
            sabotage="shared, 16 accounts, repeats left out",
        ),
    ),
    run=_accounts,
)

# ----------------------------------------------------------------------------------------------- of a language model


@dataclass(frozen=True)
class _Size:
    """What a scale spends.

    Attributes:
        texts, teacher_steps: of the teacher's training.
        student_steps: of a student's, of which the best on its validation split is kept.
        accounts: few, some and many.
        visits: of the benign user to each question.
        held, samples: questions that no account asks, and the teacher's answers to each, which students are measured
            on.
        seeds, control_seeds: of the arms; of controls and of the sweep.
        reworded: shares of questions that fall into other buckets.
    """

    texts: int
    teacher_steps: int
    student_steps: int
    accounts: tuple[int, int, int]
    visits: int
    held: int
    samples: int
    seeds: int
    control_seeds: int
    reworded: tuple[float, ...]


_SIZES = {
    "quick": _Size(500, 2, 1, (1, 2, 3), 1, 10, 1, 1, 1, (1.0,)),
    "evidence": _Size(16_000, 340, 240, (1, 4, 16), 8, 100, 4, 5, 3, (0.25, 0.5, 1.0)),
}
_SIZES["gpu"] = _SIZES["evidence"]
_FEW, _SOME, _MANY = "one account", "some accounts", "many accounts"
_TEACHER: dict[str, int] = {"width": 96, "depth": 3, "batch": 32}
_STUDENT: dict[str, int] = {"width": 64, "depth": 2, "batch": 16}
_LONGEST = 26
"""Tokens of an answer; an explanation has 22."""
_POOL = [f"{a}{c}+{b}{d}=" for a in range(1, 5) for b in range(1, 5) for c in range(5) for d in range(5)]
_ASKED = 4
"""Questions of a bucket that each account asks, once each."""
_SIDES = sides(_POOL)
"""By question: 0 for train, 1 for the validation split, 2 for the test split of whoever trains on it."""
_WORDS = (("so", "ok", "hm", "oh"), ("is", "==", "->", "=>"), (", ", "; ", "& "), (": ", "! "))


def _kind(question: str) -> str:
    """The bucket, one of 16: the tens of both numbers."""
    return question[0] + question[3]


def _explanation(question: str, draw: np.random.Generator) -> str:
    """One of 192 phrasings, equally long and equally likely; in 1 of 20 the units are wrong by one."""
    a, c, b, d = (int(question[at]) for at in (0, 1, 3, 4))
    units = (c + d + (draw.choice((1, 9)) if draw.random() < 0.05 else 0)) % 10
    begin, equals, then, end = (words[draw.integers(len(words))] for words in _WORDS)
    sums = [f"{a}+{b}{equals}{a + b}", f"{c}+{d}{equals}{units}"]
    draw.shuffle(sums)
    return f"{begin} {then.join(sums)}{end}{a + b}{units}"


def _right(question: str, answer: str) -> bool:
    return answer[-2:] == str(int(question[:2]) + int(question[3:5]))


def _questions(draw: np.random.Generator, held: int) -> tuple[list[str], list[str]]:
    """Those that accounts ask, by bucket, and others of the same buckets. Of 64, 8 are of the validation split of a
    student and 1 of its test split, which is not looked at."""
    left, found = [55, 8, 1], {_kind(question): list[str]() for question in _POOL}
    order = [(side, _POOL[at]) for at in draw.permutation(len(_POOL)) for side in [int(_SIDES[at])]]
    for side, question in sorted(order, key=lambda one: one[0] == 0):  # the rare ones first
        if left[side] and len(found[_kind(question)]) < _ASKED:
            found[_kind(question)].append(question)
            left[side] -= 1
    asked = [question for each in found.values() for question in each]
    return asked, [question for _, question in order if question not in asked][:held]


def _trained(
    folder: Path, name: str, rows: Sequence[tuple[str, str]], of: Mapping[str, int], steps: int, seed: int
) -> RunFolder:
    """A run with the weights that were best on its validation split, measured 12 times."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"prompt": question, "response": text}) + "\n" for question, text in rows))
    recipe: dict[str, Any] = {
        "model": {"width": of["width"], "depth": of["depth"], "attention": {"heads": 4}, "position": "learned"},
        "data": {"kind": "responses", "path": str(path), "tokenizer": "bytes", "block": 96,
                 "cache": str(folder / "cache")},
        "optimizer": {"kind": "muon", "lr": 1e-2},
        "schedule": {"kind": "cosine", "warmup": 20},
        **one_thread(steps, of["batch"], blocks=256),
    }  # fmt: skip
    recipe["trainer"] |= {"seed": seed, "device": "cpu", "keep_best": True}
    recipe["evaluate"] |= {"test": False, "every": max(1, steps // 12)}
    run = train(recipe, out=folder / name, quiet=True)
    run.publish(run.state / (run.state / "BEST").read_text())
    return run


class _Model:
    """A run's model, ready to answer and to be measured."""

    def __init__(self, run: RunFolder) -> None:
        self.model, self.tokenizer = run.model(), run.tokenizer()
        self._engine = Engine(self.model, self.tokenizer, compile="off")

    def answer(
        self, questions: Sequence[str], requests: Sequence[Request], noise: NoiseSource | None, temperature: float = 1.0
    ) -> list[Completion]:
        """One answer to each question."""
        ids = [[self.tokenizer.separator, *each] for each in self.tokenizer.encode_batch(questions)]
        how = Sampling(max_new_tokens=_LONGEST, logprobs=0, temperature=temperature)
        return self._engine.generate(ids, how, requests=requests, noise=noise)

    def loss(self, rows: Sequence[tuple[str, str]]) -> float:
        """Nats a token of answers, their end included."""
        questions, answers = (self.tokenizer.encode_batch(texts) for texts in zip(*rows, strict=True))
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in Responses(list(zip(questions, answers, strict=True)), self.tokenizer).evaluation(256):
                nll_BT = CausalLM().evaluate(self.model, batch).nll_BT
                assert nll_BT is not None
                total += float(nll_BT.sum())
                count += int((batch["next"] >= 0).sum())
        return total / count


@dataclass(frozen=True)
class _Learner:
    """Trains students of one seed, once for each set of distinct rows, and measures them on questions that none asked:
    loss on the teacher's `fresh` answers, share of right ones among the students' own likeliest."""

    folder: Path
    steps: int
    seed: int
    held: Sequence[str]
    fresh: Sequence[tuple[str, str]]
    known: dict[tuple[tuple[str, str], ...], tuple[float, float]] = field(default_factory=dict)

    def learned(self, rows: Sequence[tuple[str, str]]) -> tuple[float, float]:
        """Loss and share of right answers after training on these rows, repeats left out."""
        once = tuple(dict.fromkeys(rows))
        if once not in self.known:
            name = f"{self.seed}-{len(self.known)}"
            student = _Model(_trained(self.folder, name, once, _STUDENT, self.steps, self.seed))
            best = student.answer(self.held, self.held, None, temperature=0.0)
            right = [_right(question, each.text) for question, each in zip(self.held, best, strict=True)]
            self.known[once] = student.loss(self.fresh), sum(right) / len(right)
        return self.known[once]


@dataclass(frozen=True)
class _BothNoises:
    """A defect: noise of the bucket and of the user added up, or their mean; neither is Gumbel noise."""

    shared: NoiseSource
    own: NoiseSource
    weight: float

    def gumbel(
        self, requests: Sequence[Request], step: int, vocabulary: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        one, other = (noise.gumbel(requests, step, vocabulary, device) for noise in (self.shared, self.own))
        return self.weight * (one + other)


def _benign(teacher: _Model, questions: Sequence[str], seed: int, visits: int) -> dict[str, float]:
    """By noise, the teacher's mean log-probability of a token of its answers to one user."""
    asked = list(questions) * visits
    shared = LadsNoise(_key(seed), _kind)
    requests = shared.visit(["ann"] * len(asked), asked)
    own, again = SeededNoise(seed), SeededNoise(seed + _AGAIN)
    sources: dict[str, NoiseSource] = {
        "shared": shared,
        "independent": own,
        "sum of two noises": _BothNoises(shared, again, 1.0),
        "mean of two noises": _BothNoises(shared, again, 0.5),
    }
    found = {}
    for arm, noise in sources.items():
        said = [x for each in teacher.answer(asked, requests, noise) for x in each.logprobs or ()]
        found[arm] = sum(said) / len(said)
    return found


def _collected(
    teacher: _Model, questions: Sequence[str], seed: int, accounts: int, arm: str, reworded: float = 0.0
) -> list[list[tuple[str, str]]]:
    """By account, its questions and their answers. The first asks them as they are listed; the others shuffle those
    of each bucket, so that a question meets all noises of its bucket, unless they ask alike."""
    draw = Key(seed).fold("accounts").numpy()
    orders = [list(questions)]
    for _ in range(accounts - 1):
        at_BA = np.arange(len(questions)).reshape(-1, _ASKED)
        if arm != "shared, asked alike":
            at_BA = draw.permuted(at_BA, axis=1)
        orders.append([questions[at] for at in at_BA.ravel().tolist()])
    noise: NoiseSource
    if arm.startswith("independent"):
        noise = SeededNoise(seed + (_AGAIN if arm == "independent again" else 0))
        requests: list[Request] = [f"{n} {at}" for n in range(accounts) for at in range(len(questions))]
    else:
        noise, requests = LadsNoise(_key(seed), lambda bucket: bucket), []
        for n, order in enumerate(orders):
            before = f"user {n} " if arm == "shared, user in the seed" else ""
            buckets = [before + _kind(each) for each in order]
            away = draw.random(len(order)) < reworded
            buckets = [f"other {draw.integers(2**14)}" if off else b for b, off in zip(buckets, away, strict=True)]
            requests += noise.visit([f"user {n}"] * len(order), buckets)
    asked = [question for order in orders for question in order]
    said = [(question, each.text) for question, each in zip(asked, teacher.answer(asked, requests, noise), strict=True)]
    return [said[at : at + len(questions)] for at in range(0, len(said), len(questions))]


def _students(scale: Scale, first: int) -> Measured:
    size = _SIZES[scale]
    values: dict[str, dict[int, float]] = {}
    right: list[bool] = []
    with tempfile.TemporaryDirectory(prefix="torchstone-lads-") as name:
        folder = Path(name)
        draw = Key(first).fold("explanations").numpy()
        texts = [(question, _explanation(question, draw)) for question in draw.choice(_POOL, size.texts).tolist()]
        teacher = _Model(_trained(folder, "teacher", texts, _TEACHER, size.teacher_steps, first))
        for seed in range(first, first + size.seeds):
            asked, held = _questions(Key(seed).fold("questions").numpy(), size.held)
            unseen = held * size.samples
            said = teacher.answer(unseen, [f"unseen {at}" for at in range(len(unseen))], SeededNoise(seed))
            fresh = [(question, each.text) for question, each in zip(unseen, said, strict=True)]
            right += [_right(*row) for row in fresh]
            for arm, logp in _benign(teacher, asked, seed, size.visits).items():
                values.setdefault(f"{arm}: log-probability", {})[seed] = logp
            learner = _Learner(folder, size.student_steps, seed, held, fresh)
            few, some, many = size.accounts
            control = seed < first + size.control_seeds
            arms = {"independent": 0.0, "shared": 0.0, "shared, asked alike": 0.0}
            if control:
                arms |= {"independent again": 0.0, "shared, user in the seed": 0.0}
                arms |= {f"shared, {share:.0%} reworded": share for share in size.reworded}
            for arm, share in arms.items():
                harvest = _collected(teacher, asked, seed, many, arm, share)
                counts, losses = {_FEW: few, _MANY: many}, {}
                if arm in ("independent", "shared"):
                    counts[_SOME] = some
                elif share:  # one account is worth the same whatever it is asked
                    del counts[_FEW]
                    losses[_FEW] = values[f"shared, {_FEW}: loss"][seed]
                for title, count in counts.items():
                    losses[title], accuracy = learner.learned([row for account in harvest[:count] for row in account])
                    values.setdefault(f"{arm}, {title}: loss", {})[seed] = losses[title]
                    values.setdefault(f"{arm}, {title}: right", {})[seed] = accuracy
                gain = losses[_FEW] - losses[_MANY]
                values.setdefault(f"{arm}: gain", {})[seed] = gain
                if arm == "independent":
                    values.setdefault("half of the independent gain", {})[seed] = gain / 2
    return Measured({"right answers of the teacher to held-out questions": sum(right) / len(right)}, values)


_students.builds = (  # type: ignore[attr-defined]
    *_BUILDS,
    "torchstone.data.responses",
    "torchstone.objectives.causal_lm",
    "torchstone.train.optimizers.muon",
)

STUDENTS = Claim(
    id="accounts-of-a-student",
    kind="behaviour",
    text="Accounts ask a byte model of three layers to explain additions, 4 questions of each of 16 buckets once each; "
    "a student of two layers learns from the answers, repeats left out, and stops where its own validation split "
    "is best. With noise of their own, 16 accounts bring it at least 0.2 nats a token nearer to fresh answers to "
    "other questions than one does, and make at least 10 points more of its answers right. Accounts that share "
    "noise and ask alike are worth at least 0.1 nats less than half of that. Where each shuffles the questions of "
    "a bucket, so that every question meets all noises of its bucket, 16 stay at least 0.05 nats behind 16 with "
    "noise of their own. Answers to one user are as likely to the teacher as with ordinary noise, within 0.01 "
    "nats a token. What shuffling leaves of the gain, its right answers, and accounts that move a part of their "
    "questions to other buckets are measured beside it and no part of the claim.",
    figure="the gain of distillation falls from 29.8 to 11.2 points (MATH, GSM8K, HumanEval, Code Alpaca)",
    gates=(
        Effect(
            "without sharing, accounts bring the student nearer",
            f"independent, {_MANY}: loss",
            f"independent, {_FEW}: loss",
            margin=0.2,
            null=f"independent again, {_FEW}: loss",
            sabotage=f"shared, asked alike, {_MANY}: loss",
        ),
        Effect(
            "without sharing, accounts make more answers right",
            f"independent, {_MANY}: right",
            f"independent, {_FEW}: right",
            margin=0.1,
            null=f"independent again, {_FEW}: right",
            sabotage=f"shared, asked alike, {_MANY}: right",
            lower_is_better=False,
        ),
        Effect(
            "asked alike, less than half of the gain",
            "shared, asked alike: gain",
            "half of the independent gain",
            margin=0.1,
            null="independent again: gain",
            sabotage="shared, user in the seed: gain",
        ),
        Effect(
            "shuffled, farther from the teacher than without sharing",
            f"shared, {_MANY}: loss",
            f"independent, {_MANY}: loss",
            margin=0.05,
            null=f"independent again, {_MANY}: loss",
            sabotage=f"shared, user in the seed, {_MANY}: loss",
            lower_is_better=False,
        ),
        Effect(
            "one user: answers no less likely",
            "shared: log-probability",
            "independent: log-probability",
            margin=-0.01,
            sabotage="sum of two noises: log-probability",
            lower_is_better=False,
        ),
        Effect(
            "one user: answers no likelier",
            "shared: log-probability",
            "independent: log-probability",
            margin=-0.01,
            sabotage="mean of two noises: log-probability",
        ),
    ),
    run=_students,
)

PAPER = Paper(
    slug="lads",
    title="Lossless Anti-Distillation Sampling",
    authors="Zibo Diao, Jingchu Gai, Xinyue Ai, Zhang Zhang, Zhenyu He, Di He",
    year=2026,
    link="https://arxiv.org/abs/2605.18829",
    topics=("sampling", "distillation", "trust"),
    parts=("noise.lads",),
    summary="The noise of an answer is a secret function of the kind of question and of how often its user has asked: "
    "each user gets independent exact samples, many accounts get what one gets.",
    claims=(EXACT, ACCOUNTS, STUDENTS),
)
