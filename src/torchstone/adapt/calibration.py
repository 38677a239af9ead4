"""Prototypical calibration (Han et al. 2022, arXiv 2205.10183): in-context classification without a fixed boundary.

A language model that classifies by the probabilities of label words has its boundary where they are alike, and what is
probable there depends on template, demonstrations and words. Here the boundary is estimated from unlabelled texts. Of
each text the model gives a vector over the C labels, ``v = log p`` with p renormalised over them. A Gaussian mixture of
C components is fitted to the vectors; components belong to labels by the perfect matching with the largest *profit*,
and a text gets the label of its most likely component::

    k* = argmax_k sum_n mu[n, k(n)]                       k a permutation of the labels
    y  = k*(argmax_n N(v; mu_n, Sigma_n))                 the mixture's own weights are not used

Of several fits from random starts the one with the largest profit is taken, not the most likely one.

Ours beside it: the feature `clr`, ``u = v - mean(v)``, which a bias on the labels' logits only translates, so that it
changes no prediction; and the choice of a fit by `likelihood`. Two labels make plain logarithms lie on a curve.
*Contextual calibration* (Zhao et al. 2021, arXiv 2102.09690) is the baseline: probabilities are divided by those of
inputs without content.

A matching looks at means alone. Where a model knows nothing of the labels it is arbitrary, and `margin` over the second
best does not show it: half of a cloud without classes has a mean of its own too.

Shapes: N texts, C labels, which are as many as components and coordinates. All in float64.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import log_softmax, softmax

from torchstone.errors import TorchstoneError
from torchstone.evaluate.scoring import Job, Scorer
from torchstone.generate import Engine
from torchstone.keys import Key
from torchstone.train.run import RunFolder

__all__ = [
    "CONTENT_FREE",
    "Calibration",
    "Classifier",
    "Covariance",
    "Feature",
    "Mixture",
    "Select",
    "Words",
    "check_enough",
    "contextual",
    "features",
    "fit_mixture",
    "match",
]

Calibration = Literal["none", "contextual", "prototypical"]
Covariance = Literal["auto", "full", "diag"]
Feature = Literal["log", "clr"]
Select = Literal["profit", "likelihood"]
Words = Literal["first", "all"]
Array = np.ndarray

CONTENT_FREE = ("N/A", "", "[MASK]")
"""Inputs without content, as contextual calibration takes them."""
_LEAST = math.log(1e-12)
"""A probability of 0 has no logarithm."""
_LLOYD = 10
"""Times that a start's points move to the middles of what is nearest to them."""
_FULL = 20
"""Labels up to which `auto` estimates full covariances: their numbers grow with C squared."""


def features(logprobs_NC: Array, feature: Feature = "log") -> Array:
    """What the mixture sees (N, C): log-probabilities over the labels, at least log 1e-12; `clr` takes off their mean.

    Args:
        logprobs_NC: of the labels, up to a constant of each text.
        feature: log, as the paper has it, or clr.
    """
    v_NC = np.maximum(log_softmax(np.asarray(logprobs_NC, np.float64), axis=1), _LEAST)
    return v_NC - v_NC.mean(1, keepdims=True) if feature == "clr" else v_NC


def contextual(logprobs_NC: Array, free_MC: Array) -> Array:
    """Probabilities (N, C) divided by the average ones of M inputs without content, and renormalised."""
    mean_C = np.exp(features(free_MC)).mean(0)
    return softmax(features(logprobs_NC) - np.log(mean_C), axis=1)


@dataclass(frozen=True)
class Matching:
    """Labels of components.

    Attributes:
        label_C: label of each component, a permutation.
        profit: sum of the means at the labels.
        margin: how much less the second best permutation has.
        second_C: that permutation.
    """

    label_C: Array
    profit: float
    margin: float
    second_C: Array


def match(mean_CC: Array) -> Matching:
    """The matching of components (rows) to labels (columns) with the largest profit.

    The second best lacks at least one pair of the best: it is the best of those that lack a given one.
    """
    rows, label_C = linear_sum_assignment(mean_CC, maximize=True)
    profit, second, second_C = float(mean_CC[rows, label_C].sum()), -math.inf, label_C
    forbidden = profit - 2 * (abs(mean_CC).sum() + 1)  # finite, and never worth it
    for row in rows:
        without_CC = mean_CC.astype(np.float64)
        without_CC[row, label_C[row]] = forbidden
        _, other_C = linear_sum_assignment(without_CC, maximize=True)
        found = float(mean_CC[rows, other_C].sum())
        if found > second:
            second, second_C = found, other_C
    return Matching(label_C, profit, profit - second, second_C)


@dataclass(frozen=True)
class Mixture:
    """A fitted mixture whose components belong to labels.

    Attributes:
        mean_CC, covariance_CCC: of each component, the first axis.
        weight_C: shares that were estimated; no decision looks at them.
        matching: labels of components.
        noise: standard error of the matching's margin, from covariances and shares.
        likelihood: mean log-likelihood of a text in the fit.
        restart: which start it came from.
        kept: starts in which no component held fewer than 1 / (5 C) of the texts.
        profits: of all starts that were looked at.
    """

    mean_CC: Array
    covariance_CCC: Array
    weight_C: Array
    matching: Matching
    noise: float
    likelihood: float
    restart: int
    kept: int
    profits: tuple[float, ...]

    def posteriors(self, v_NC: Array) -> Array:
        """Probability (N, C) of each label, all being equally frequent."""
        density_NC = _log_density(v_NC, self.mean_CC, self.covariance_CCC)
        by_label_NC = np.empty_like(density_NC)
        by_label_NC[:, self.matching.label_C] = density_NC
        return softmax(by_label_NC, axis=1)


def _log_density(v_NC: Array, mean_CC: Array, covariance_CCC: Array) -> Array:
    """Logarithm (N, C) of each component's density at each vector."""
    root_CCC = np.linalg.cholesky(covariance_CCC)
    white_CCN = np.linalg.solve(root_CCC, (v_NC - mean_CC[:, None]).transpose(0, 2, 1))
    volume_C = np.log(np.diagonal(root_CCC, axis1=1, axis2=2)).sum(1)
    return (-0.5 * (white_CCN**2).sum(1) - volume_C[:, None]).T - 0.5 * v_NC.shape[1] * math.log(2 * math.pi)


def _moments(v_NC: Array, share_NC: Array, regularisation: float, diagonal: bool) -> tuple[Array, Array, Array]:
    """Weights, means and covariances of components that texts belong to by these shares."""
    count_C = share_NC.sum(0) + 10 * np.finfo(np.float64).eps
    mean_CC = share_NC.T @ v_NC / count_C[:, None]
    away_CNC = v_NC - mean_CC[:, None]
    covariance_CCC = (away_CNC * share_NC.T[:, :, None]).transpose(0, 2, 1) @ away_CNC / count_C[:, None, None]
    if diagonal:
        covariance_CCC *= np.eye(mean_CC.shape[1])
    return count_C / len(v_NC), mean_CC, covariance_CCC + regularisation * np.eye(mean_CC.shape[1])


def fit_mixture(
    v_NC: Array,
    key: Key,
    *,
    restarts: int = 100,
    select: Select = "profit",
    covariance: Covariance = "auto",
    regularisation: float = 1e-6,
    iterations: int = 100,
    tolerance: float = 1e-3,
) -> Mixture:
    """Fit a mixture by expectation maximisation and match its components to labels.

    A start draws C texts and moves them to the middles of the texts nearest to each, a few times; these shares are the
    first ones. Starts in which a component ends up with
    fewer than 1 / (5 C) of the texts count only if there is no other.

    Args:
        v_NC: vectors of unlabelled texts, from `features`.
        key: each start is a function of it and the start's number, so that more of them keep those before.
        restarts: starts.
        select: the fit with the largest profit, as the paper has it, or with the largest likelihood.
        covariance: full, diag, or auto: full for up to 20 labels.
        regularisation: added to the diagonals of covariances.
        iterations: at most so many steps of a fit.
        tolerance: a fit ends when a step adds less than this to the mean log-likelihood.

    Raises:
        TorchstoneError: fewer texts than labels, numbers that are not finite, an option that does not exist.
    """
    v_NC = np.asarray(v_NC, np.float64)
    N, C = v_NC.shape
    _one_of("select", select, Select)
    _one_of("covariance", covariance, Covariance)
    if C < 2:
        raise TorchstoneError(f"calibration: {C} labels, two are the least")
    check_enough(N, C)
    if not np.isfinite(v_NC).all():
        raise TorchstoneError("calibration: log-probabilities are not all finite")
    for name, value in (("restarts", restarts), ("iterations", iterations)):
        if value < 1:
            raise TorchstoneError(f"{name}: is {value}, 1 or more is needed")
    for name, size in (("regularisation", regularisation), ("tolerance", tolerance)):
        if not 0 < size < math.inf:
            raise TorchstoneError(f"{name}: needs a positive number, got {size}")
    diagonal = covariance == "diag" or (covariance == "auto" and C > _FULL)

    best: tuple[tuple[bool, float], int, tuple[Array, Array, Array], Matching, float] | None = None
    kept, profits = 0, []
    for restart in range(restarts):
        centre_CC = v_NC[key.fold("start", restart).numpy().choice(N, C, replace=False)]
        for _ in range(_LLOYD):
            nearest_N = (0.5 * (centre_CC**2).sum(1) - v_NC @ centre_CC.T).argmin(1)
            share_NC = np.eye(C)[nearest_N]
            held_C1 = share_NC.sum(0)[:, None]
            centre_CC = np.where(held_C1 > 0, share_NC.T @ v_NC / np.maximum(held_C1, 1), centre_CC)
        parts = _moments(v_NC, share_NC, regularisation, diagonal)
        before = -math.inf
        for _ in range(iterations):
            joint_NC = _log_density(v_NC, *parts[1:]) + np.log(parts[0])
            highest_N1 = joint_NC.max(1, keepdims=True)
            share_NC = np.exp(joint_NC - highest_N1)
            total_N1 = share_NC.sum(1, keepdims=True)
            likelihood = float((np.log(total_N1) + highest_N1).mean())
            if abs(likelihood - before) < tolerance:
                break
            before = likelihood
            parts = _moments(v_NC, share_NC / total_N1, regularisation, diagonal)
        matching = match(parts[1])
        whole = bool(parts[0].min() >= 1 / (5 * C))
        kept += whole
        profits.append(matching.profit)
        rank = whole, matching.profit if select == "profit" else likelihood
        if best is None or rank > best[0]:
            best = rank, restart, parts, matching, likelihood
    assert best is not None
    _, restart, (weight_C, mean_CC, covariance_CCC), matching, likelihood = best
    eye_CC = np.eye(C)
    between_CC = eye_CC[matching.label_C] - eye_CC[matching.second_C]
    variance_C = np.einsum("nc,ncd,nd->n", between_CC, covariance_CCC, between_CC) / (weight_C * N)
    noise = math.sqrt(float(variance_C.sum()))
    return Mixture(
        mean_CC, covariance_CCC, weight_C, matching, noise, likelihood, restart, kept, tuple(profits)
    )  # fmt: skip


class Classifier:
    """Classifies texts by the label word that a language model puts after them.

    Args:
        source: a run, an engine with its model and tokenizer, or a scorer, whose prefix may hold demonstrations.
        template: how a text and its label are written, with ``{x}`` and, at its end in an input, ``{y}``.
        labels: label words, as they stand in the template.
        demonstrations: texts with their labels, written before each input in this order.
        calibration: none, contextual or prototypical.
        between: what stands after each demonstration.
        words: `first` compares the words' first tokens, `all` the mean over all tokens of a word.
        feature: log, as the paper has it, or clr, which a bias on the labels leaves alone.
        select: which fit is taken, by profit, as the paper has it, or likelihood.
        restarts: fits from random starts.
        covariance: of components: full, diag, or auto, which is full for up to 20 labels.
        regularisation: added to the diagonals of covariances; 1e-6 to 1e-3.
        content_free: inputs without content, for contextual calibration.
        seed: of the starts.

    Raises:
        TorchstoneError: a template without both places, labels that cannot be told apart or that demonstrations do not
            have, a model that reads both ways, an option that does not exist.
    """

    def __init__(
        self,
        source: RunFolder | Engine | Scorer,
        template: str,
        labels: Sequence[str],
        *,
        demonstrations: Sequence[tuple[str, str]] = (),
        calibration: Calibration = "prototypical",
        between: str = "\n\n",
        words: Words = "first",
        feature: Feature = "log",
        select: Select = "profit",
        restarts: int = 100,
        covariance: Covariance = "auto",
        regularisation: float = 1e-6,
        content_free: Sequence[str] = CONTENT_FREE,
        seed: int = 0,
    ) -> None:
        for name, value, options in (
            ("calibration", calibration, Calibration),
            ("words", words, Words),
            ("feature", feature, Feature),
            ("select", select, Select),
            ("covariance", covariance, Covariance),
        ):
            _one_of(name, value, options)
        if template.count("{x}") != 1 or template.count("{y}") != 1 or template.index("{x}") > template.index("{y}"):
            raise TorchstoneError(f"template: needs {{x}} once and {{y}} once after it, not {template!r}")
        if len(labels) < 2 or len(set(labels)) < len(labels) or not all(labels):
            raise TorchstoneError(f"labels: two or more different words are needed, got {list(labels)}")
        if (unknown := next((word for _, word in demonstrations if word not in labels), None)) is not None:
            raise TorchstoneError(f"demonstrations: label {unknown!r} is none of {', '.join(map(repr, labels))}")
        if calibration == "contextual" and not content_free:
            raise TorchstoneError("content_free: contextual calibration needs an input without content")
        if restarts < 1:
            raise TorchstoneError(f"restarts: is {restarts}, 1 or more is needed")
        if not 0 < regularisation < math.inf:
            raise TorchstoneError(f"regularisation: needs a positive number, got {regularisation}")
        self.scorer = _scorer(source)
        if self.scorer.masked:
            raise TorchstoneError("calibration: a masked language model reads both ways and continues no prompt")
        self.template, self.demonstrations, self.between = template, tuple(demonstrations), between
        self.labels, self.calibration, self.words = tuple(labels), calibration, words
        self.feature, self.select, self.restarts = feature, select, restarts
        self.covariance, self.regularisation, self.seed = covariance, regularisation, seed
        self.content_free = tuple(content_free)
        before, rest = template.split("{x}")
        middle, end = rest.split("{y}")
        shown = "".join(f"{before}{text}{middle}{label}{end}{between}" for text, label in demonstrations)
        self._before, self._after = shown + before, middle
        self.mixture: Mixture | None = None
        """What `fit` found for prototypical calibration."""
        self._free_MC: Array | None = None
        self._jobs("x", "labels")  # refuses labels that cannot be told apart before anything is computed

    def _jobs(self, text: str, where: str) -> list[Job]:
        """One job for each label after a text."""
        prompt, window, jobs = self._before + text + self._after, self.scorer.window, []
        for label in self.labels:
            found = self.scorer.continuation(prompt, label, where)
            (job,) = found.jobs
            if found.cut or (window is not None and len(job.ids) > window):
                raise TorchstoneError(
                    f"{where}: {found.cut + len(job.ids)} tokens with the demonstrations, and the model's window has "
                    f"{window}"
                )
            if self.words == "first":
                job = Job(job.ids[: job.at[0] + 1], job.at[:1], job.targets[:1], job.memory)
            jobs.append(job)
        seen: dict[int, str] = {}
        for label, job in zip(self.labels, jobs, strict=True):
            if self.words == "first" and (other := seen.setdefault(job.targets[0], label)) != label:
                raise TorchstoneError(
                    f"{where}: {other!r} and {label!r} begin with the same token after the template; words: all "
                    "compares whole words"
                )
        return jobs

    def scores(self, texts: Sequence[str]) -> Array:
        """Log-probability (N, C), in nats, of each label word after each text: of its first token, or with words: all
        the mean over its tokens. Only differences between labels count.

        Raises:
            TorchstoneError: a text that does not fit into the window with the demonstrations.
        """
        jobs = [
            ((n, c), job)
            for n, text in enumerate(texts)
            for c, job in enumerate(self._jobs(text, f"text {text[:40]!r}"))
        ]
        score_NC = np.zeros((len(texts), len(self.labels)))
        totals = self.scorer.totals(jobs, "calibration", len(jobs))
        for at, job in jobs:
            score_NC[at] = totals[at] / len(job.targets)
        return score_NC

    def fit(self, texts: Sequence[str] = ()) -> Classifier:
        """Estimate the calibration; only the prototypical one looks at the texts, which may be those to classify.

        What makes the estimate doubtful is said in a line on stderr: components that hold next to nothing in every
        start, and a second matching that is as good as the best.

        Raises:
            TorchstoneError: fewer texts than labels, one that does not fit into the window.
        """
        if self.calibration == "prototypical":
            check_enough(len(texts), len(self.labels))
            return self.fit_scores(self.scores(texts))
        if self.calibration == "contextual":
            self._free_MC = self.scores(self.content_free)
        return self

    def fit_scores(self, scores_NC: Array) -> Classifier:
        """As `fit` with prototypical calibration, from what `scores` gave.

        Raises:
            TorchstoneError: fewer texts than labels.
        """
        self.mixture = found = fit_mixture(
            features(scores_NC, self.feature),
            Key(self.seed).fold("calibration"),
            restarts=self.restarts,
            select=self.select,
            covariance=self.covariance,
            regularisation=self.regularisation,
        )
        if not found.kept:
            print(
                f"calibration: in each of {self.restarts} starts a component holds less than 1/{5 * len(self.labels)} "
                "of the texts; more texts, or ones whose labels are more alike in number, would help",
                file=sys.stderr,
            )
        if found.matching.margin < 2 * found.noise:
            print(
                f"calibration: the second matching of labels is only {found.matching.margin:.2g} nats worse than the "
                f"best, with a standard error of {found.noise:.2g}; labels may be mixed up",
                file=sys.stderr,
            )
        return self

    def probabilities(self, texts: Sequence[str]) -> Array:
        """Probability (N, C) of each label.

        Raises:
            TorchstoneError: the calibration is not fitted, a text that does not fit into the window.
        """
        self._ready()
        return self.calibrated(self.scores(texts))

    def calibrated(self, scores_NC: Array) -> Array:
        """Probability (N, C) of each label, from what `scores` gave.

        Raises:
            TorchstoneError: the calibration is not fitted.
        """
        self._ready()
        if self.mixture is not None:
            return self.mixture.posteriors(features(scores_NC, self.feature))
        if self._free_MC is not None:
            return contextual(scores_NC, self._free_MC)
        return np.exp(features(scores_NC))

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The most probable label of each text.

        Raises:
            TorchstoneError: as `probabilities`.
        """
        return [self.labels[best] for best in self.probabilities(texts).argmax(1)]

    def _ready(self) -> None:
        if self.calibration != "none" and self.mixture is None and self._free_MC is None:
            raise TorchstoneError(f"calibration: {self.calibration} is not fitted yet; call fit first")


def _scorer(source: RunFolder | Engine | Scorer) -> Scorer:
    if isinstance(source, Scorer):
        return source
    if isinstance(source, RunFolder):
        return Scorer.of_run(source)
    if source.tokenizer is None:
        raise TorchstoneError("calibration: the engine has no tokenizer, and templates are texts")
    return Scorer(source.model, source.tokenizer, start=source.start)


def check_enough(texts: int, labels: int) -> None:
    """Whether a mixture can be fitted to so many texts.

    Raises:
        TorchstoneError: there are fewer than labels.
    """
    if texts < labels:
        raise TorchstoneError(f"calibration: {texts} texts to estimate {labels} components from; as many are the least")


def _one_of(name: str, value: str, options: object) -> None:
    if value not in get_args(options):
        raise TorchstoneError(f"{name}: one of {', '.join(get_args(options))}, not {value!r}")
