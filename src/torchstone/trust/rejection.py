"""Rejection: scores that say how far to trust a prediction, thresholds, and how well scores tell right from wrong.

    Con       the largest probability                                higher is better trusted, as of all scores here
    R-Con     A * Con, A the auxiliary head        Pang et al. 2022, arXiv 2105.14785
    A         the auxiliary head alone
    entropy   minus the entropy of the prediction, in nats
    energy    log-sum-exp of the logits            Liu et al. 2020, arXiv 2010.03759

The coupled rule accepts where Con > 1 / (2 - xi) and R-Con > 1/2. Where A is a xi-error of T-Con / Con (T-Con being the
probability of the true class), that is |log A - log A*| <= log(2 / (2 - xi)) or |A - A*| <= xi / 2, every right
prediction with Con > 1 / (2 - xi) has R-Con > 1/2 and every wrong one R-Con < 1/2.

B examples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import nn

from torchstone.data._examples import Examples
from torchstone.errors import TorchstoneError
from torchstone.ops import at_least_float32
from torchstone.trust.model._classifier import Classified, classifies_images

__all__ = [
    "RejectingClassifier",
    "Rejection",
    "Scores",
    "accuracy_at",
    "auc",
    "calibrate",
    "check_xi",
    "coupled",
    "ideal_auxiliary",
    "scores_of",
    "xi_error",
]


@dataclass(frozen=True)
class Scores:
    """Scores of B predictions, each (B,); higher is better trusted. `rcon` and `auxiliary` need the auxiliary head."""

    con: torch.Tensor
    entropy: torch.Tensor
    energy: torch.Tensor
    rcon: torch.Tensor | None = None
    auxiliary: torch.Tensor | None = None

    def items(self) -> dict[str, torch.Tensor]:
        """Those that are there, by name."""
        pairs = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in pairs.items() if value is not None}


def scores_of(out: Classified) -> Scores:
    """The scores of what a classifier gave."""
    logits_BC, head_B = at_least_float32(out.logits), getattr(out, "auxiliary", None)
    log_p_BC = logits_BC.log_softmax(1)
    con_B = log_p_BC.amax(1).exp()
    auxiliary_B = None if head_B is None else at_least_float32(head_B)
    return Scores(
        con=con_B,
        entropy=(log_p_BC.exp() * log_p_BC).sum(1),
        energy=logits_BC.logsumexp(1),
        rcon=None if auxiliary_B is None else auxiliary_B * con_B,
        auxiliary=auxiliary_B,
    )


# ------------------------------------------------------------------------------------------------------------ rules


def calibrate(score_B: torch.Tensor, right_B: torch.Tensor, keep: float = 0.95) -> float:
    """The largest threshold that at least a share `keep` of the right predictions reaches: accept score >= threshold.

    Without ties the share is `keep` to within one prediction.

    Raises:
        TorchstoneError: no prediction is right, or `keep` is no share above 0.
    """
    if not 0 < keep <= 1:
        raise TorchstoneError(f"keep: {keep:g} is no share above 0 and up to 1")
    of_right = score_B[right_B]
    if not len(of_right):
        raise TorchstoneError("calibrate: none of the examples is classified correctly, so there is nothing to keep")
    # the small number keeps 0.95 * 100, which floats make larger than 95, at 95
    rank = max(1, math.ceil(keep * len(of_right) - 1e-9))
    return float(of_right.sort(descending=True).values[rank - 1])


def check_xi(xi: float) -> None:
    """Refuse a xi that the coupled rule has no meaning for.

    Raises:
        TorchstoneError: xi is outside [0, 1).
    """
    if not 0 <= xi < 1:
        raise TorchstoneError(f"xi: {xi:g} is outside [0, 1)")


def coupled(con_B: torch.Tensor, rcon_B: torch.Tensor, xi: float = 0.0) -> torch.Tensor:
    """Where the coupled rule accepts: Con > 1 / (2 - xi) and R-Con > 1/2; bool (B,).

    Raises:
        TorchstoneError: xi is outside [0, 1).
    """
    check_xi(xi)
    return (con_B > 1 / (2 - xi)) & (rcon_B > 0.5)


def ideal_auxiliary(probs_BC: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
    """A* = T-Con / Con, (B,): with it R-Con is the probability of the true class."""
    return probs_BC.gather(1, label_B[:, None])[:, 0] / probs_BC.amax(1)


def xi_error(auxiliary_B: torch.Tensor, ideal_B: torch.Tensor) -> torch.Tensor:
    """The smallest xi of which A is a xi-error, (B,), by the better of the two definitions; 1 or more is none."""
    absolute_B = 2 * (auxiliary_B - ideal_B).abs()
    ratio_B = 2 - 2 * torch.exp(-(auxiliary_B.log() - ideal_B.log()).abs())
    return torch.minimum(absolute_B, ratio_B)


# ---------------------------------------------------------------------------------------------------------- metrics


def auc(score_B: torch.Tensor, right_B: torch.Tensor) -> float:
    """The share of pairs of a right and a wrong prediction in which the right one scores higher, ties counting half:
    the area under the ROC curve. NaN where there is no such pair."""
    right, wrong = int(right_B.sum()), int((~right_B).sum())
    if not right or not wrong:
        return math.nan
    _, place_B, count_U = torch.unique(score_B.double(), return_inverse=True, return_counts=True)
    rank_U = count_U.cumsum(0) - (count_U - 1) / 2  # tied scores share the mean of their ranks
    total = float(rank_U.double()[place_B][right_B].sum())
    return (total - right * (right + 1) / 2) / (right * wrong)


def accuracy_at(score_B: torch.Tensor, right_B: torch.Tensor, keep: float = 0.95) -> float:
    """Accuracy among the predictions that are accepted when a share `keep` of the right ones is ("TPR-95"). NaN where
    no prediction is right."""
    if not bool(right_B.any()):
        return math.nan
    accepted_B = score_B >= calibrate(score_B, right_B, keep)
    return float(right_B[accepted_B].double().mean())


# -------------------------------------------------------------------------------------------------------- classifier


class Rejection(NamedTuple):
    """What a rejecting classifier answers: the class (B,), whether it stands by it (B,), and the scores."""

    label: torch.Tensor
    accepted: torch.Tensor
    scores: Scores


class RejectingClassifier:
    """A classifier that may abstain.

    Without `calibrate` it goes by the coupled rule; after it, it accepts where a score reaches the threshold.

    Args:
        model: an image classifier with the auxiliary head, trained with the objective `rectified_rejection`.
        xi: of the coupled rule.

    Raises:
        TorchstoneError: a model that classifies no images or has no auxiliary head; xi outside [0, 1).
    """

    def __init__(self, model: nn.Module, xi: float = 0.0) -> None:
        if not classifies_images(getattr(model, "spec", None)):
            raise TorchstoneError("RejectingClassifier: needs a classifier of images, as model mlp or preact_resnet")
        if getattr(model, "rejection", None) is None:
            raise TorchstoneError(
                "RejectingClassifier: the model has no auxiliary head; set model.rejection and train with objective "
                "rectified_rejection"
            )
        check_xi(xi)
        self.model, self.xi = model.eval(), xi
        self.score, self.threshold = "rcon", None

    score: str
    threshold: float | None

    def calibrate(
        self,
        batches: Examples | Iterable[Mapping[str, Any]] | Mapping[str, Any],
        keep: float = 0.95,
        score: str = "rcon",
    ) -> RejectingClassifier:
        """This classifier, with the threshold that keeps a share `keep` of the right predictions on clean images.

        Args:
            batches: a split of images, as ``prepared.valid``; or batches with ``pixels`` and ``label``, as its
                ``evaluation(256)`` gives them; or one of them.
            keep: the share.
            score: con, rcon, auxiliary, entropy or energy.

        Raises:
            TorchstoneError: no such score; no right prediction among the examples; no examples at all.
        """
        if isinstance(batches, Examples):
            batches = batches.evaluation(256)
        given = [batches] if isinstance(batches, Mapping) or not isinstance(batches, Iterable) else list(batches)
        for batch in given:
            columns = [batch.get(name) for name in ("pixels", "label")] if isinstance(batch, Mapping) else [None]
            if not all(isinstance(column, torch.Tensor) for column in columns):
                raise TorchstoneError(
                    "calibrate: needs a split of images, as data.valid, or batches with tensors pixels and label"
                )
        found = [(self._scores(batch["pixels"]), batch["label"]) for batch in given]
        if not found:
            raise TorchstoneError("calibrate: there is no example to calibrate on")
        names = [field.name for field in fields(Scores)]
        if score not in names:
            raise TorchstoneError(f"score: is one of {', '.join(names)}, not {score!r}")
        score_B = torch.cat([getattr(scores, score) for (_, scores), _ in found])
        right_B = torch.cat([predicted_B == label_B.to(predicted_B.device) for (predicted_B, _), label_B in found])
        self.score, self.threshold = score, calibrate(score_B, right_B, keep)
        return self

    @torch.no_grad()
    def _scores(self, pixels: torch.Tensor) -> tuple[torch.Tensor, Scores]:
        out: Classified = self.model(pixels.to(next(self.model.parameters()).device))
        return out.logits.argmax(1), scores_of(out)

    def __call__(self, pixels: torch.Tensor) -> Rejection:
        """Classify (B, channels, I, I), values from 0 to 1."""
        label_B, scores = self._scores(pixels)
        if self.threshold is None:
            assert scores.rcon is not None
            return Rejection(label_B, coupled(scores.con, scores.rcon, self.xi), scores)
        return Rejection(label_B, getattr(scores, self.score) >= self.threshold, scores)
