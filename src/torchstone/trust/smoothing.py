"""Randomised smoothing (Cohen et al. 2019, arXiv 1902.02918): a classifier with a proof, made of any classifier.

    g(x) = argmax_c E 1[argmax f(x + d) = c],  d ~ N(0, sigma^2 I)

If the class c has probability p > 1/2 under the noise, no change of x of L2 norm below R = sigma Phi^-1(p) changes
g(x). p is bounded from below, with confidence 1 - alpha, from samples that did not choose c:

    votes    Clopper and Pearson: the alpha-quantile of Beta(k, n - k + 1), k of n samples voting for c
    soft     E softmax(beta f)_c in the place of votes (Zhai et al. 2020, arXiv 2001.02378), by the empirical Bernstein
             bound m - sqrt(2 v log(2/alpha) / n) - 7 log(2/alpha) / (3 (n - 1)), v the unbiased variance

What is smoothed is a plain callable of floats. For text that is what follows the embeddings; ids are refused. The
noise of an example is a function of the key, its number and what it is for, whatever else is in the batch.

N examples, S samples of one example, C classes; x is (N, ...).
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from scipy import stats

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.trust.model._classifier import Classified

__all__ = [
    "ABSTAIN",
    "Certified",
    "SmoothedClassifier",
    "average_certified_radius",
    "bernstein",
    "certified_accuracy",
    "clopper_pearson",
    "largest_radius",
]

ABSTAIN = -1
"""The label of an example of which the samples do not tell enough."""
_AT_ONCE = 250
"""Samples of one example that are drawn and classified at once; noise depends on it, results on no batch size."""
_KEY = Key(0).fold("smoothing")


class Certified(NamedTuple):
    """What is proved of each example."""

    label: torch.Tensor
    """(N,) int64, `ABSTAIN` where nothing is certified."""
    radius: torch.Tensor
    """(N,) float64, in L2; 0 where nothing is certified."""


class SmoothedClassifier:
    """`classify` under Gaussian noise.

    Args:
        classify: floats (S, ...) -> `Classified`; a module must be in evaluation mode.
        sigma: standard deviation of the noise on each number.
    """

    def __init__(self, classify: Callable[[torch.Tensor], Classified], sigma: float) -> None:
        if not 0 < sigma < math.inf:
            raise TorchstoneError(f"sigma: is {sigma}, and must be a number above 0")
        self.classify, self.sigma = classify, float(sigma)

    def predict(
        self, x: torch.Tensor, n: int = 1000, alpha: float = 0.001, *, key: Key = _KEY, first: int = 0
    ) -> torch.Tensor:
        """(N,): the class of most votes, wrong about the smoothed one with probability alpha at most; `ABSTAIN` where a
        two-sided binomial test does not tell it from the second."""
        self._check(x, alpha, n=n)
        labels = []
        for row, example in enumerate(x):
            votes_C, _ = self._sums(example, n, None, key.fold("predict", first + row))
            (most, second), class_2 = votes_C.topk(2)
            sure = stats.binomtest(int(most), int(most + second), 0.5).pvalue <= alpha
            labels.append(int(class_2[0]) if sure else ABSTAIN)
        return torch.tensor(labels, dtype=torch.long)

    def certify(
        self,
        x: torch.Tensor,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        beta: float | None = None,
        *,
        key: Key = _KEY,
        first: int = 0,
    ) -> Certified:
        """A class and a radius for each example, which are wrong with probability alpha at most.

        Args:
            n0: samples that choose the class.
            n: further samples, which bound its probability.
            beta: None certifies votes; a number the softmax at this inverse temperature, a smoothed classifier of
                its own.
            first: number of the first example, where x is a part of more.
        """
        self._check(x, alpha, n0=n0, n=n)
        if beta is not None and not (0 < beta < math.inf and n > 1):
            raise TorchstoneError(f"beta: is {beta} with n {n}; softmax is certified with beta above 0 and n above 1")
        if (most := largest_radius(self.sigma, n, alpha, soft=beta is not None)) <= 0:
            warnings.warn(f"n {n} certifies nothing at alpha {alpha}: the largest radius is {most:g}", stacklevel=2)
        labels, radii = [], []
        for row, example in enumerate(x):
            chosen = int(self._sums(example, n0, beta, key.fold("choose", first + row))[0].argmax())
            sum_C, square_C = self._sums(example, n, beta, key.fold("bound", first + row))
            if beta is None:
                low = clopper_pearson(round(float(sum_C[chosen])), n, alpha)
            else:
                low = bernstein(float(sum_C[chosen]), float(square_C[chosen]), n, alpha)
            labels.append(chosen if low > 0.5 else ABSTAIN)
            radii.append(self.sigma * float(stats.norm.ppf(low)) if low > 0.5 else 0.0)
        return Certified(torch.tensor(labels, dtype=torch.long), torch.tensor(radii, dtype=torch.float64))

    def _check(self, x: torch.Tensor, alpha: float, **counts: int) -> None:
        if not isinstance(x, torch.Tensor):
            raise TorchstoneError(f"smoothing: x is a {type(x).__name__}; give a tensor of floats")
        if not x.is_floating_point():
            raise TorchstoneError(
                f"smoothing: x is {x.dtype}, to which noise cannot be added; give floats in whose units sigma is, such "
                "as pixels from 0 to 1, or of token ids their embeddings with what follows these as the classifier"
            )
        if not 0 < alpha < 1:
            raise TorchstoneError(f"alpha: is {alpha}, and must lie between 0 and 1")
        for name, count in counts.items():
            if not isinstance(count, numbers.Integral) or count < 1:
                raise TorchstoneError(f"{name}: is {count}, and must be a whole number of 1 or more")
        if isinstance(self.classify, torch.nn.Module) and self.classify.training:
            raise TorchstoneError("smoothing: the model is in training mode, in which its answers change; call eval()")

    @torch.no_grad()
    def _sums(self, example: torch.Tensor, n: int, beta: float | None, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over n samples of votes or of softmax, and of their squares, float64 (C,)."""
        total, square = [], []
        for block, start in enumerate(range(0, n, _AT_ONCE)):
            shape = (min(_AT_ONCE, n - start), *example.shape)
            noise = torch.randn(shape, generator=key.fold(block).generator(), dtype=torch.float32).to(example)
            logits_SC = self.classify(example + self.sigma * noise).logits.double()
            if logits_SC.shape[1] < 2:
                raise TorchstoneError("smoothing: the classifier has one class, and needs two or more")
            if beta is None:
                value_SC = torch.nn.functional.one_hot(logits_SC.argmax(1), logits_SC.shape[1]).double()
            else:
                value_SC = (beta * logits_SC).softmax(1)
            total.append(value_SC.sum(0))
            square.append(value_SC.square().sum(0))
        return torch.stack(total).sum(0).cpu(), torch.stack(square).sum(0).cpu()


# ------------------------------------------------------------------------------------------------------------- bounds


def clopper_pearson(count: int, n: int, alpha: float) -> float:
    """Below which a probability of which `count` of n draws came true lies with probability alpha at most."""
    return float(stats.beta.ppf(alpha, count, n - count + 1)) if count else 0.0


def bernstein(total: float, square: float, n: int, alpha: float) -> float:
    """The same of a mean of values from 0 to 1, of the sum of n of them and of their squares."""
    variance = max(0.0, (square - total * total / n) / (n - 1))
    log = math.log(2 / alpha)
    return max(0.0, total / n - math.sqrt(2 * variance * log / n) - 7 * log / (3 * (n - 1)))


def largest_radius(sigma: float, n: int, alpha: float, soft: bool = False) -> float:
    """What n samples certify if they all agree; 0 if they cannot certify anything."""
    low = bernstein(n, n, n, alpha) if soft else clopper_pearson(n, n, alpha)
    return sigma * float(stats.norm.ppf(low)) if low > 0.5 else 0.0


# ------------------------------------------------------------------------------------------------------------ metrics


def certified_accuracy(
    found: Certified, label_N: torch.Tensor, radii: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
) -> list[float]:
    """For each radius the share of examples that are classified as labelled, certified as far as that."""
    right_N = found.label == label_N
    return [float((right_N & (found.radius >= r)).double().mean()) for r in radii]


def average_certified_radius(found: Certified, label_N: torch.Tensor) -> float:
    """The mean radius; a wrong class and an abstention count 0 (ACR)."""
    return float(torch.where(found.label == label_N, found.radius, 0.0).mean())
