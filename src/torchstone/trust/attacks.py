"""Attacks: pixels that make a function of them large, near those of an image.

What is attacked is a plain callable, so that any model, loss or detector can be. A *gain* maps pixels to one number an
example, which the attack raises; a *shortfall* maps them to some numbers an example, all of which must fall to zero.
Nothing here changes a model: gradients are taken with respect to pixels alone, those of parameters stay as they were,
layers stay in the mode in which they are, and no taps are passed.

    pgd               Madry et al. 2018 (arXiv 1706.06083): signed gradient steps within a ball, restarts
    adaptive_pgd      PGD on cross-entropy + eta * log R-Con, for an attacker that knows the auxiliary head
    multi_target      a run of PGD for each likely wrong class (Gowal et al. 2019, arXiv 1910.09338)
    gama              Sriramanan et al. 2020 (arXiv 2011.14969): PGD on the margin of probabilities, led away from
                      those of the clean image at first
    carlini_wagner    Carlini and Wagner 2017 (arXiv 1608.04644): the nearest pixels, in L2, that evade

B examples, C classes, S shortfalls; pixels are (B, ...), as the callable takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from torchstone.keys import Key
from torchstone.ops import at_least_float32
from torchstone.trust.model._classifier import Classified

__all__ = [
    "ETAS",
    "Ball",
    "Gain",
    "adaptive_gain",
    "adaptive_pgd",
    "ascend",
    "carlini_wagner",
    "cross_entropy_gain",
    "divergence_gain",
    "gama",
    "log_rcon",
    "margin",
    "multi_target",
    "pgd",
    "shortfalls",
    "uniform",
]

Gain = Callable[[torch.Tensor], torch.Tensor]
"""Pixels (B, ...) -> (B,), to be raised."""
Classify = Callable[[torch.Tensor], Classified]
ETAS = (0.1, 0.3, 1.0)
"""Weights of log R-Con that an attacker tries."""


@dataclass(frozen=True)
class Ball:
    """Pixels that differ by at most `epsilon` each (L-infinity) from an image's, within what a pixel may be."""

    epsilon: float
    low: float = 0.0
    high: float = 1.0

    def project(self, x: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
        """The nearest pixels to `x` that are in the ball around `center`."""
        near = torch.minimum(torch.maximum(x, center - self.epsilon), center + self.epsilon)
        return near.clamp(self.low, self.high)


def uniform(pixels: torch.Tensor, epsilon: float, key: Key) -> torch.Tensor:
    """Noise of the shape of `pixels`, uniform from -epsilon to epsilon, the same on every device."""
    noise = torch.rand(pixels.shape, generator=key.generator()) * 2 - 1
    return (noise * epsilon).to(pixels.device, pixels.dtype)


def ascend(
    gain: Gain, pixels: torch.Tensor, start: torch.Tensor, ball: Ball, steps: int, step_size: float
) -> torch.Tensor:
    """From `start`, `steps` steps of `step_size` along the sign of the gradient, each projected on the ball around
    `pixels`; a pixel without gradient stays."""
    x = ball.project(start, pixels).detach()
    for _ in range(steps):
        x = ball.project(x + step_size * _slope(gain, x).sign(), pixels)
    return x


def _slope(gain: Gain, x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(gain(x).sum(), x)
    return slope


def pgd(
    gain: Gain,
    pixels: torch.Tensor,
    ball: Ball,
    steps: int = 50,
    step_size: float | None = None,
    restarts: int = 1,
    key: Key | None = None,
) -> torch.Tensor:
    """Projected gradient ascent on `gain`; of several restarts, for each example the one that gains most.

    Args:
        step_size: by default 2.5 epsilon over the steps, so that every corner can be reached from anywhere.
        restarts: each from noise of its own.
        key: of the noise; None starts at the image itself, which is worth one start alone.
    """
    size = 2.5 * ball.epsilon / max(1, steps) if step_size is None else step_size
    best, most_B = pixels, None
    for number in range(restarts if key is not None else 1):
        start = pixels if key is None else pixels + uniform(pixels, ball.epsilon, key.fold("restart", number))
        x = ascend(gain, pixels, start, ball, steps, size)
        with torch.no_grad():
            gained_B = gain(x)
        if most_B is None:
            best, most_B = x, gained_B
        else:
            best, most_B = _better(x, gained_B, best, most_B)
    return best


def _better(
    x: torch.Tensor, gained_B: torch.Tensor, best: torch.Tensor, most_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each example the pixels with the larger gain, and that gain."""
    more_B = gained_B > most_B
    return torch.where(more_B.view(-1, *[1] * (x.dim() - 1)), x, best), torch.where(more_B, gained_B, most_B)


# ----------------------------------------------------------------------------------------------------------- gains


def cross_entropy_gain(classify: Classify, label_B: torch.Tensor) -> Gain:
    """Cross-entropy in nats; 0 where the label is -100."""
    return lambda pixels: F.cross_entropy(at_least_float32(classify(pixels).logits), label_B, reduction="none")


def divergence_gain(classify: Classify, logits_BC: torch.Tensor) -> Gain:
    """KL divergence of the prediction from the one of fixed `logits_BC`, KL(p || p(x)), in nats (TRADES)."""
    log_p_BC = torch.log_softmax(at_least_float32(logits_BC), 1).detach()

    def gain(pixels: torch.Tensor) -> torch.Tensor:
        log_q_BC = torch.log_softmax(at_least_float32(classify(pixels).logits), 1)
        return (log_p_BC.exp() * (log_p_BC - log_q_BC)).sum(1)

    return gain


def log_rcon(out: Classified) -> torch.Tensor:
    """log (A * Con), (B,); of a classifier with the auxiliary head."""
    assert out.auxiliary is not None
    log_con_B = torch.log_softmax(at_least_float32(out.logits), 1).amax(1)
    return log_con_B + at_least_float32(out.auxiliary).clamp(min=1e-12).log()


def adaptive_gain(classify: Classify, label_B: torch.Tensor, eta: float = 1.0) -> Gain:
    """Cross-entropy + eta * log R-Con: wrong, and trusted all the same.

    Where the prediction is right cross-entropy is -log Con, so that at eta = 1 the two cancel and A alone is raised: an
    eta below 1 is what makes predictions wrong.
    """

    def gain(pixels: torch.Tensor) -> torch.Tensor:
        out = classify(pixels)
        return F.cross_entropy(at_least_float32(out.logits), label_B, reduction="none") + eta * log_rcon(out)

    return gain


def margin(logits_BC: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
    """By how much the largest wrong logit, or probability, exceeds the label's, (B,): above zero where the class is
    wrong."""
    there_BC = F.one_hot(label_B, logits_BC.shape[1]).bool()
    return logits_BC.masked_fill(there_BC, -torch.inf).amax(1) - logits_BC.gather(1, label_B[:, None])[:, 0]


# ------------------------------------------------------------------------------------------------- several runs


def adaptive_pgd(
    classify: Classify,
    pixels: torch.Tensor,
    label_B: torch.Tensor,
    ball: Ball,
    etas: Sequence[float] = ETAS,
    steps: int = 50,
    step_size: float | None = None,
    restarts: int = 1,
    key: Key | None = None,
) -> torch.Tensor:
    """PGD on `adaptive_gain` for each eta; for each example the run that is wrong with the largest R-Con, or, if none
    is wrong, the one with the largest cross-entropy."""
    best, most_B = pixels, torch.full_like(label_B, -torch.inf, dtype=torch.float64)
    for number, eta in enumerate(etas):
        drawn = None if key is None else key.fold("eta", number)
        x = pgd(adaptive_gain(classify, label_B, eta), pixels, ball, steps, step_size, restarts, drawn)
        with torch.no_grad():
            out = classify(x)
            loss_B = F.cross_entropy(at_least_float32(out.logits), label_B, reduction="none")
            # a wrong prediction is worth more than any right one: R-Con is above 0, and exp(-loss) at most 1
            worth_B = torch.where(out.logits.argmax(1) != label_B, log_rcon(out).exp(), -(-loss_B).exp())
            best, most_B = _better(x, worth_B.to(most_B.dtype), best, most_B)
    return best


def multi_target(
    classify: Classify,
    pixels: torch.Tensor,
    label_B: torch.Tensor,
    ball: Ball,
    targets: int = 9,
    steps: int = 50,
    step_size: float | None = None,
    key: Key | None = None,
) -> torch.Tensor:
    """A run of PGD on z_t - z_y for each of the `targets` wrong classes t that are likeliest before the attack; for
    each example the run after which the largest wrong logit exceeds the label's by most."""
    with torch.no_grad():
        clean_BC = at_least_float32(classify(pixels).logits)
    order_BC = clean_BC.scatter(1, label_B[:, None], -torch.inf).argsort(1, descending=True)
    best, most_B = pixels, margin(clean_BC, label_B)
    for number in range(min(targets, clean_BC.shape[1] - 1)):
        both_B2 = torch.stack([order_BC[:, number], label_B], 1)

        def gain(x: torch.Tensor, both_B2: torch.Tensor = both_B2) -> torch.Tensor:
            logits_B2 = at_least_float32(classify(x).logits).gather(1, both_B2)
            return logits_B2[:, 0] - logits_B2[:, 1]

        x = pgd(gain, pixels, ball, steps, step_size, key=None if key is None else key.fold("target", number))
        with torch.no_grad():
            best, most_B = _better(x, margin(at_least_float32(classify(x).logits), label_B), best, most_B)
    return best


def gama(
    classify: Classify,
    pixels: torch.Tensor,
    label_B: torch.Tensor,
    ball: Ball,
    steps: int = 100,
    weight: float = 50.0,
    restarts: int = 1,
    key: Key | None = None,
) -> torch.Tensor:
    """Guided adversarial margin attack: signed steps that raise max_{c != y} p_c - p_y + w ||p - p(clean)||^2 of the
    probabilities p; of several restarts, for each example the one of the largest margin.

    w falls in a straight line from `weight` to 0 over the first quarter of the steps; a step is 2 epsilon, a tenth of
    that from 60 % of the steps on and a hundredth from 85 %. Starts are corners of the ball, each drawn from `key`, or
    the image itself without one. (The authors' code measures the distance from its start, their paper from the image.)
    """

    def probs(x: torch.Tensor) -> torch.Tensor:
        return at_least_float32(classify(x).logits).softmax(1)

    with torch.no_grad():
        clean_BC = probs(pixels)
    best, most_B = pixels, None
    for number in range(restarts if key is not None else 1):
        x = pixels
        if key is not None:
            x = x + ball.epsilon * uniform(pixels, 1.0, key.fold("restart", number)).sign()
        for step in range(steps):
            w = weight * max(0.0, 1 - 4 * step / steps)
            size = 2 * ball.epsilon / 10 ** sum(step >= share * steps for share in (0.6, 0.85))

            def gain(x: torch.Tensor, w: float = w) -> torch.Tensor:
                p_BC = probs(x)
                return margin(p_BC, label_B) + w * (p_BC - clean_BC).square().sum(1)

            x = ascend(gain, pixels, x, ball, 1, size)
        with torch.no_grad():
            found_B = margin(probs(x), label_B)
        best, most_B = (x, found_B) if most_B is None else _better(x, found_B, best, most_B)
    return best


# ------------------------------------------------------------------------------------------------ Carlini and Wagner


def shortfalls(classify: Classify, label_B: torch.Tensor, threshold: float | None = None) -> Gain:
    """What an evasion lacks, (B, S), all to fall to zero: the label's logit over the largest wrong one, and with a
    `threshold` what log R-Con lacks to its logarithm, by which a rejecting classifier would refuse it."""

    def lacking(pixels: torch.Tensor) -> torch.Tensor:
        out = classify(pixels)
        rows = [-margin(at_least_float32(out.logits), label_B)]
        if threshold is not None:
            rows.append(torch.tensor(threshold).log().to(pixels.device) - log_rcon(out))
        return torch.stack(rows, 1)

    return lacking


def carlini_wagner(
    lacking: Gain,
    pixels: torch.Tensor,
    searches: int = 9,
    iterations: int = 100,
    rate: float = 0.01,
    weight: float = 0.01,
    confidence: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest pixels in L2, from 0 to 1, whose shortfalls are all below zero.

    Minimises ||x - pixels||^2 + c * sum_s max(shortfall_s, -confidence) by Adam over arctanh of pixels; c is searched
    for each example: divided between bounds once something evaded, times ten until then.

    Args:
        lacking: pixels (B, ...) -> (B, S), as `shortfalls` makes it.
        searches: values of c that are tried.
        iterations: steps of Adam for each.
        rate: of Adam.
        weight: the first c.
        confidence: how far below zero shortfalls are pushed.

    Returns:
        the pixels, the image's own where nothing evaded, and their distance in L2 (B,), infinite there.
    """
    rows = len(pixels)
    inner = ((pixels.clamp(0, 1) * 2 - 1) * (1 - 1e-6)).atanh()
    best, least_B = pixels.clone(), pixels.new_full((rows,), torch.inf)
    low_B, high_B = pixels.new_zeros(rows), pixels.new_full((rows,), torch.inf)
    weight_B = pixels.new_full((rows,), weight)
    for _ in range(searches):
        w = inner.clone().requires_grad_()
        adam = torch.optim.Adam([w], lr=rate)
        evaded_B = torch.zeros(rows, dtype=torch.bool, device=pixels.device)
        for _ in range(iterations):
            with torch.enable_grad():
                x = (w.tanh() + 1) / 2
                square_B = (x - pixels).flatten(1).square().sum(1)
                lack_BS = lacking(x)
                loss_B = square_B + weight_B * lack_BS.clamp(min=-confidence).sum(1)
                (w.grad,) = torch.autograd.grad(loss_B.sum(), w)
            adam.step()
            now_B = (lack_BS.detach() < 0).all(1)
            evaded_B |= now_B
            distance_B = square_B.detach().sqrt()
            nearer_B = now_B & (distance_B < least_B)
            best = torch.where(nearer_B.view(-1, *[1] * (x.dim() - 1)), x.detach(), best)
            least_B = torch.where(nearer_B, distance_B, least_B)
        high_B = torch.where(evaded_B, torch.minimum(high_B, weight_B), high_B)
        low_B = torch.where(evaded_B, low_B, torch.maximum(low_B, weight_B))
        weight_B = torch.where(high_B.isinf(), weight_B * 10, (low_B + high_B) / 2)
    return best, least_B
