"""Advantages: how much better an answer is than the other answers to its prompt.

With r the rewards of a group, m their mean and s their standard deviation:

    group_std       (r - m) / s             GRPO (Shao et al. 2024, arXiv 2402.03300, eq. 5)
    group_mean      r - m                   Dr. GRPO (Liu et al. 2025, arXiv 2503.20783)
    leave_one_out   r - mean of the others  RLOO (Ahmadian et al. 2024, arXiv 2402.14740)
    batch_std       (r - m) / std of all rewards of the step
    none            r

Standard deviations are those of a population (divided by the number of rewards), so a group's advantages have exactly
the deviation 1. A group whose rewards are all the same has advantages of exactly 0. Answers without a reward are in no
mean and have none.

Shapes: R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

__all__ = ["Advantage", "advantages"]

Advantage = Literal["group_std", "group_mean", "leave_one_out", "batch_std", "none"]

_SAME = 1e-9
"""Deviations of this size, relative to the rewards, are rounding."""


def advantages(rewards: Sequence[float | None], groups: Sequence[int], how: Advantage) -> tuple[np.ndarray, np.ndarray]:
    """The advantage of each answer, and the standard deviation of its group's rewards, float64 (R,).

    Args:
        rewards: None where an answer has none.
        groups: a number for each answer, the same for those to one prompt.
        how: see above; `batch_std` is not divided yet, for a step's other micro-batches count too.
    """
    known_R = np.array([reward is not None for reward in rewards])
    reward_R = np.array([0.0 if reward is None else reward for reward in rewards])
    _, group_R = np.unique(np.asarray(groups), return_inverse=True)
    count_R = np.bincount(group_R, known_R)[group_R]
    mean_R = (np.bincount(group_R, reward_R) / np.maximum(1, np.bincount(group_R, known_R)))[group_R]
    centred_R = np.where(known_R, reward_R - mean_R, 0.0)
    spread_R = np.sqrt((np.bincount(group_R, centred_R**2) / np.maximum(1, np.bincount(group_R, known_R)))[group_R])
    flat_R = spread_R <= _SAME * (1 + np.abs(mean_R))
    spread_R, centred_R = np.where(flat_R, 0.0, spread_R), np.where(flat_R, 0.0, centred_R)
    if how == "group_std":
        return centred_R / np.where(flat_R, 1.0, spread_R), spread_R
    if how == "leave_one_out":
        return centred_R * count_R / np.maximum(1, count_R - 1), spread_R
    return reward_R if how == "none" else centred_R, spread_R
