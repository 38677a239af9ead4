"""What a table of embeddings tells of how often its words are used (Gong et al. 2018, arXiv 1809.06858, section 3).

`probe_accuracy` asks how well a linear probe tells popular from rare words: a logistic regression on some of them,
scored on the others. Both sides count the same, so that 1/2 is chance. `nearest_popular` gives each rare word the
popular one of the largest cosine: in a table that keeps frequencies apart from meanings it means nearly the same.

Shapes: V words, E width of the table, R rare words.
"""

from __future__ import annotations

from typing import Any

import torch

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.objectives.frequency_adversary import sides_of
from torchstone.train.run import RunFolder
from torchstone.train.training import facts_of

__all__ = ["examine", "nearest_popular", "probe_accuracy", "text_of"]

_NEWTON = 30
"""Newton's steps of one regression; some ten are enough."""


def examine(run: RunFolder, *, popular: int | None = None, words: int = 10) -> dict[str, Any]:
    """How well a probe tells the popular tokens of a run's table from its rare ones, and what is near rare ones.

    Args:
        run: of a model with an embedding of tokens; its training split, which is counted, must be there still.
        popular: how many of the most frequent tokens are popular; None takes a fifth of all.
        words: rare tokens to show, the most frequent of them.

    Raises:
        TorchstoneError: the model has no table, or no token is rare.
    """
    recipe = run.require().recipe
    prepared = recipe.data.prepare()
    facts = facts_of(prepared, recipe)
    table = getattr(getattr(model := run.model(), "embedding", None), "table", lambda: None)()
    if facts.frequencies is None or table is None:
        raise TorchstoneError(f"frequency: {run.path}: model {type(model).__name__} has no embedding of tokens")
    count_V = facts.frequencies()
    special = [id for id in (facts.mask, facts.pad, facts.separator) if id is not None]
    side_V = sides_of(count_V, popular or max(1, len(count_V) // 5), special, facts.vocabulary)
    rare = (side_V == 1).nonzero()[:, 0]
    near = dict(zip(rare.tolist(), nearest_popular(table, side_V).tolist(), strict=True))
    shown = rare[count_V[rare].argsort(descending=True, stable=True)][:words].tolist()

    def word(id: int) -> str:
        return str(id) if prepared.tokenizer is None else prepared.tokenizer.decode([id])

    return {
        "popular": int((side_V == 0).sum()),
        "rare": len(rare),
        "probe_accuracy": probe_accuracy(table, side_V, Key(0)),
        "nearest": [{"rare": word(id), "count": int(count_V[id]), "popular": word(near[id])} for id in shown],
    }


def text_of(report: dict[str, Any]) -> str:
    """The report of `examine` for a reader."""
    lines = [
        f"{report['popular']:,} popular tokens, {report['rare']:,} rare ones",
        f"told apart by a linear probe: {report['probe_accuracy']:.3f} (chance 0.5)",
        *(f"{row['rare']!r} ({row['count']:,}): nearest popular {row['popular']!r}" for row in report["nearest"]),
    ]
    return "\n".join(lines)


def probe_accuracy(
    table_VE: torch.Tensor, side_V: torch.Tensor, key: Key, folds: int = 5, ridge: float = 0.01
) -> float:
    """Balanced accuracy of a cross-validated logistic probe of the sides.

    Args:
        table_VE: embeddings.
        side_V: 0 popular, 1 rare; words of another side are left out.
        key: what the folds are drawn from; each has its share of both sides.
        folds: parts that are scored in turn by a probe of the others.
        ridge: penalty on the squares of the probe's weights, beside a mean loss.

    Raises:
        TorchstoneError: a side has fewer words than there are folds.
    """
    fold_V, generator = torch.full_like(side_V, -1), key.generator()
    for side in (0, 1):
        words = (side_V == side).nonzero()[:, 0]
        if len(words) < folds:
            raise TorchstoneError(f"frequency: {len(words)} words are too few for {folds} folds")
        fold_V[words[torch.randperm(len(words), generator=generator)]] = torch.arange(len(words)) % folds
    x_VE = table_VE.detach().double().cpu()
    right = torch.zeros(2, dtype=torch.float64)
    for fold in range(folds):
        learnt, asked = (fold_V >= 0) & (fold_V != fold), fold_V == fold
        mean_E, std_E = x_VE[learnt].mean(0), x_VE[learnt].std(0).clamp(min=1e-12)
        x_V1E = torch.cat([torch.ones(len(x_VE), 1, dtype=x_VE.dtype), (x_VE - mean_E) / std_E], 1)
        w = _logistic(x_V1E[learnt], side_V[learnt].double(), ridge)
        told = (x_V1E @ w > 0).long() == side_V
        right += torch.stack([told[asked & (side_V == side)].double().sum() for side in (0, 1)])
    return float((right / torch.stack([(side_V == side).sum() for side in (0, 1)])).mean())


def nearest_popular(table_VE: torch.Tensor, side_V: torch.Tensor) -> torch.Tensor:
    """The popular word of the largest cosine to each rare one, in the order of their ids, int64 (R,)."""
    unit_VE = torch.nn.functional.normalize(table_VE.detach().double(), dim=-1)
    popular = (side_V == 0).nonzero()[:, 0]
    return popular[(unit_VE[side_V == 1] @ unit_VE[popular].T).argmax(-1)]


def _logistic(x_NF: torch.Tensor, y_N: torch.Tensor, ridge: float) -> torch.Tensor:
    """Weights (F,) of least balanced loss by Newton's method; the first feature is the constant, not penalised."""
    share_N = torch.where(y_N > 0, 0.5 / y_N.sum(), 0.5 / (1 - y_N).sum())
    penalty_F = torch.full((x_NF.shape[1],), ridge, dtype=x_NF.dtype)
    penalty_F[0] = 0
    w = torch.zeros_like(penalty_F)
    for _ in range(_NEWTON):
        p_N = torch.sigmoid(x_NF @ w)
        slope_F = x_NF.T @ (share_N * (p_N - y_N)) + penalty_F * w
        bend_FF = x_NF.T @ ((share_N * p_N * (1 - p_N)).unsqueeze(1) * x_NF) + torch.diag(penalty_F)
        w = w - torch.linalg.solve(bend_FF + 1e-12 * torch.eye(len(w), dtype=w.dtype), slope_F)
    return w
