"""Attention resolution (Sun et al. 2022, arXiv 2212.10554, section 3.2): how monotonously scores fall with distance.

    R(s) = sum_(i < N) e^(s_i) (e^(s_i) - e^(s_(i+1))) / (sum_(i <= N) e^(s_i))^2

s_i is the score expected at distance i. A curve that falls everywhere has a positive resolution, a constant one has
none, and one that goes up and down loses what it gained. Adding a number to all scores changes nothing.

Shapes: H heads, N + 1 distances, K channels.
"""

from __future__ import annotations

import torch

from torchstone.errors import TorchstoneError
from torchstone.model.position import Position
from torchstone.model.tokens import Tokens
from torchstone.ops.attention import scores_reference

__all__ = ["attention_resolution", "score_curve"]


def attention_resolution(scores: torch.Tensor) -> torch.Tensor:
    """R of each curve (..., N + 1) of scores by distance: (...).

    Raises:
        TorchstoneError: less than two distances.
    """
    if scores.shape[-1] < 2:
        raise TorchstoneError(f"attention resolution: needs two distances or more, got {scores.shape[-1]}")
    share = torch.softmax(scores.double(), -1)
    return (share[..., :-1] * -share.diff(dim=-1)).sum(-1)


def score_curve(position: Position, heads: int, dim: int, longest: int) -> torch.Tensor:
    """Scores (H, longest + 1) by distance that a position gives queries and keys of one direction.

    All channels are 1 before the position is laid on them, and scores are divided by sqrt(K), so a position that says
    nothing gives sqrt(K) everywhere.

    Args:
        position: a module, as `PositionSpec.build` makes it or ``model.main.positions`` holds it.
        heads: H.
        dim: K.
        longest: the largest distance.
    """
    k = Tokens.blank(longest + 1)
    q = k.slice(longest, longest + 1)
    q_BH1K, k_BHSK = torch.ones(1, heads, 1, dim), torch.ones(1, heads, longest + 1, dim)
    of_q, of_k = position.rotation(q.where), position.rotation(k.where)
    if of_q is not None and of_k is not None:
        q_BH1K, k_BHSK = of_q.q(q_BH1K), of_k.k(k_BHSK)
    with torch.no_grad():
        scores = scores_reference(
            q_BH1K,
            k_BHSK,
            scale=dim**-0.5,
            causal=False,
            mask_BHTS=position.bias(q, k),
            softcap=None,
            decay=position.decay(q, k),
        )
    return scores[0, :, 0].flip(-1)
