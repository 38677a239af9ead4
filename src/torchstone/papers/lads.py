"""Lossless Anti-Distillation Sampling (Diao et al. 2026, arXiv 2605.18829)."""

from __future__ import annotations

import hashlib
import hmac
import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.stats import chi2_contingency, chisquare

from torchstone.generate.noise import NoiseSource, Request
from torchstone.generate.noise.lads import LadsNoise, seed_of
from torchstone.generate.noise.seeded import SeededNoise
from torchstone.generate.sampling import History, Sampling
from torchstone.keys import Key
from torchstone.papers._claim import Claim, Effect, Measured, Number, Paper, Scale

__all__ = ["PAPER"]

_SAMPLING = Sampling()


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
        "independent again": lambda user: own(seed + 100_000, user),
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
    claims=(EXACT, ACCOUNTS),
)
