"""Few-shot classification in episodes (after Hao et al. 2022, arXiv 2212.06713): labelled examples, then a question.

``a3 b0 c5 y1  a1 b0 c2 y0 ... a3 b7 c2 [y1]``: an example is a value of each feature and a label. The labels follow a
rule that is drawn anew for every episode, so it can only be learned from the examples before: each value of each
feature has a weight for each label, uniform in [0, 1), and the label is the one with the largest sum. Labels of
demonstrations are flipped with a probability, those of the questions behind them are not. Every label is an answer.

B episodes, E = demonstrations + questions, F features, V values, L labels.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from torchstone.data._task import TaskSpec, below

__all__ = ["EpisodesSpec"]


class EpisodesSpec(TaskSpec):
    """Few-shot classification: which label, by a rule that only this episode's examples show?"""

    paper: ClassVar[str] = "Hao et al. 2022, arXiv 2212.06713"

    demonstrations: int = Field(32, ge=0, le=2**14)
    """Examples whose labels may be flipped."""
    questions: int = Field(1, ge=1, le=2**12)
    """Examples behind them whose labels are the rule's."""
    features: int = Field(3, ge=1, le=64)
    """Tokens of an example before its label."""
    values: int = Field(8, ge=2, le=2**12)
    """Different values of a feature; every feature has ids of its own: value v of feature f is f * values + v."""
    labels: int = Field(2, ge=2, le=2**8)
    """Different labels: ids behind those of the features."""
    flips: float = Field(0.15, ge=0, lt=1)
    """Probability that a demonstration has another label than the rule's, all others alike."""

    @property
    def vocabulary(self) -> int:
        return self.features * self.values + self.labels

    @property
    def block(self) -> int:
        return (self.demonstrations + self.questions) * (self.features + 1) - 1

    @property
    def words(self) -> int:
        rule = self.features * self.values * self.labels
        return rule + (self.demonstrations + self.questions) * (self.features + 2)

    def write(self, words_BW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        F, V, L = self.features, self.values, self.labels
        rule_BW, example_BW = np.split(words_BW, [F * V * L], axis=1)
        weight_BFVL = _uniform(rule_BW).reshape(-1, F, V, L)
        example_BEN = example_BW.reshape(len(words_BW), -1, F + 2)
        value_BEF = below(example_BEN[..., :F], V)
        rows, feature_F = np.arange(len(words_BW))[:, None, None], np.arange(F)
        label_BE = weight_BFVL[rows, feature_F, value_BEF].sum(2).argmax(-1)
        other_BE = (label_BE + 1 + below(example_BEN[..., F], L - 1)) % L
        flipped_BE = _uniform(example_BEN[..., F + 1]) < self.flips
        flipped_BE[:, self.demonstrations :] = False
        label_BE = F * V + np.where(flipped_BE, other_BE, label_BE)
        ids_BEN = np.concatenate([feature_F * V + value_BEF, label_BE[..., None]], axis=2)
        ids_BS = ids_BEN.reshape(len(words_BW), -1)
        return ids_BS, ids_BS >= F * V


def _uniform(words: np.ndarray) -> np.ndarray:
    """Uniform float64 in [0, 1) from uniform uint64."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
