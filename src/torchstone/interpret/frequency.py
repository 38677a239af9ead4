"""What a table of embeddings tells of how often its words are used (Gong et al. 2018, arXiv 1809.06858, section 3).

`probe_accuracy` asks how well a linear probe tells popular from rare words: a logistic regression on some of them,
scored on the others. Both sides count the same, so that 1/2 is chance. `nearest_popular` gives each rare word the
popular one of the largest cosine: in a table that keeps frequencies apart from meanings it means nearly the same.

Frequencies are those of the run's training split. A run that was imported has none: its recipe names a corpus to go on
with, not the one that the table comes from, so that a corpus or a file of counts has to be given.

Shapes: V words, E width of the table, R rare words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from torchstone.data import DataSpec, Tokenizer
from torchstone.data.text import TextDataSpec
from torchstone.errors import TorchstoneError
from torchstone.files import read_json
from torchstone.keys import Key
from torchstone.objectives.frequency_adversary import FrequencyAdversarySpec, sides_of
from torchstone.spec import Part, Spec, validate
from torchstone.train.run import RunFolder
from torchstone.train.training import facts_of

__all__ = ["examine", "nearest_popular", "probe_accuracy", "read_counts", "text_of"]

_NEWTON = 30
"""Newton's steps of one regression; some ten are enough."""


class _Given(Spec):
    data: Part[DataSpec]


def examine(
    run: RunFolder,
    *,
    popular: int | None = None,
    words: int = 10,
    data: str | None = None,
    counts: Path | None = None,
) -> dict[str, Any]:
    """How well a probe tells the popular tokens of a run's table from its rare ones, and what is near rare ones.

    Args:
        run: of a model with an embedding of tokens.
        popular: how many of the most frequent tokens are popular; None takes the number of the run's own objective
            where that is frequency_adversary, else a fifth of all.
        words: rare tokens to show, the most frequent of them.
        data: a corpus to count, named as in a recipe; without it and `counts` it is the run's training split, which
            must be there still.
        counts: a file of counts, for `read_counts`.

    Raises:
        TorchstoneError: the model has no table, no token is rare, both `data` and `counts` are given, or neither for a
            run that was imported.
    """
    recipe = run.require().recipe
    if data is not None and counts is not None:
        raise TorchstoneError("frequency: give a corpus or a file of counts, not both")
    if data is None and counts is None and _imported(run):
        raise TorchstoneError(
            f"frequency: {run.path} was imported, and what it was trained on is not known; give a corpus (--data) or a "
            "file of counts (--counts)"
        )
    table = getattr(getattr(model := run.model(), "embedding", None), "table", lambda: None)()
    if table is None:
        raise TorchstoneError(f"frequency: {run.path}: model {type(model).__name__} has no embedding of tokens")
    if data is None and counts is None:
        prepared = recipe.data.prepare()
        tokenizer, counted = prepared.tokenizer, f"the training split of {prepared.description}"
        frequencies = facts_of(prepared, recipe).frequencies
        assert frequencies is not None  # a table of tokens has a vocabulary
        count_V = frequencies()
    else:
        tokenizer = run.tokenizer() if (run.path / "tokenizer.json").is_file() else None
        if counts is not None:
            counted, count_V = str(counts), read_counts(counts, tokenizer, len(table))
        else:
            assert data is not None
            counted, count_V = _count(data, tokenizer, len(table))
        if not count_V.any():
            raise TorchstoneError(f"frequency: {counted}: counts no token")
    if popular is None:
        own = recipe.objective
        popular = own.popular if isinstance(own, FrequencyAdversarySpec) else max(1, len(count_V) // 5)
    special = [] if tokenizer is None else [tokenizer.mask, tokenizer.pad, tokenizer.separator]
    size = None if tokenizer is None else tokenizer.vocabulary
    side_V = sides_of(count_V, popular, [id for id in special if id is not None], size)
    rare = (side_V == 1).nonzero()[:, 0]
    near = dict(zip(rare.tolist(), nearest_popular(table, side_V).tolist(), strict=True))
    shown = rare[count_V[rare].argsort(descending=True, stable=True)][:words].tolist()

    def word(id: int) -> str:
        return str(id) if tokenizer is None else tokenizer.decode([id])

    return {
        "counted": counted,
        "tokens": int(count_V.sum()),
        "popular": int((side_V == 0).sum()),
        "rare": len(rare),
        "probe_accuracy": probe_accuracy(table, side_V, Key(0)),
        "nearest": [{"rare": word(id), "count": int(count_V[id]), "popular": word(near[id])} for id in shown],
    }


def text_of(report: dict[str, Any]) -> str:
    """The report of `examine` for a reader."""
    lines = [
        f"{report['tokens']:,} tokens counted in {report['counted']}",
        f"{report['popular']:,} popular tokens, {report['rare']:,} rare ones",
        f"told apart by a linear probe: {report['probe_accuracy']:.3f} (chance 0.5)",
        *(f"{row['rare']!r} ({row['count']:,}): nearest popular {row['popular']!r}" for row in report["nearest"]),
    ]
    return "\n".join(lines)


def _imported(run: RunFolder) -> bool:
    path = run.path / "environment.json"
    return path.is_file() and "imported" in read_json(path)


def _count(data: str, tokenizer: Tokenizer | None, size: int) -> tuple[str, torch.Tensor]:
    """A corpus' title, and how often it has each token, int64 (V,)."""
    spec = validate(_Given, {"data": data}, "frequency").data
    if not isinstance(spec, TextDataSpec) or tokenizer is None:
        what = "data of texts" if tokenizer is not None else "a run with a tokenizer, or a file of counts of ids"
        raise TorchstoneError(f"frequency: to count {data!r} needs {what}")
    count_V = torch.zeros(size, dtype=torch.int64)
    for document in spec.corpus.documents():
        count_V += torch.bincount(torch.tensor(tokenizer.encode(document.text), dtype=torch.int64), minlength=size)
    return spec.corpus.title(), count_V


def read_counts(path: Path, tokenizer: Tokenizer | None, size: int) -> torch.Tensor:
    """Counts, int64 (V,), of lines of a token, a tab and how often it is used; tokens without a line count 0.

    Args:
        path: the file. Where the first field of every line is a number, these are ids; else tokens, as the vocabulary
            spells them.
        tokenizer: whose tokens these are.
        size: V.

    Raises:
        TorchstoneError: the file cannot be read; a line is none, or names a token that there is not or that stands
            twice, with its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TorchstoneError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    rows = [(n, *line.removesuffix("\r").rpartition("\t")[::2]) for n, line in enumerate(lines, 1) if line.strip()]
    for number, token, count in rows:
        if not token or not _number(count) or int(count) >= 2**62:
            raise TorchstoneError(f"{path} line {number}: a line is a token or an id, a tab and a count")
    by_id = all(_number(token) for _, token, _ in rows)
    if not by_id and tokenizer is None:
        raise TorchstoneError(f"{path}: the run has no tokenizer, so that counts are of ids")
    count_V, seen = torch.zeros(size, dtype=torch.int64), set()
    for number, token, count in rows:
        id = int(token) if by_id or tokenizer is None else tokenizer.backend.token_to_id(token)
        if id is None or id >= size:
            raise TorchstoneError(f"{path} line {number}: {token!r} is no {'id' if by_id else 'token'} of the run")
        if id in seen:
            raise TorchstoneError(f"{path} line {number}: {token!r} stands twice")
        seen.add(id)
        count_V[id] = int(count)
    return count_V


def _number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


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
