"""Speculative decoding with the modules of `stack.multi_token` (DeepSeek-AI 2024, arXiv 2412.19437, section 2.2; the
method is that of Leviathan et al. 2022, arXiv 2211.17192).

The D modules draft D tokens; one forward of the model reads them behind the newest token, and each draft stands if it
is the token that the model takes at that place. What the model takes is a function of its logits and of noise that is
keyed by place, so the text is the one without drafts, greedy or sampled. (A forward of several tokens rounds otherwise
than one of one token: where two tokens tie to within that, either may be taken.) Drafts are chosen with the same noise,
which makes them agree more often.

Module k's cache has an entry for position i once t_{i+k} is known. Per row, with n tokens read by the model, that is
n + 1 - k of them; entries after those rest on drafts, and are taken back once the next tokens are known.

Shapes: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from torchstone.errors import TorchstoneError
from torchstone.model.head import VocabularyHead
from torchstone.model.stack.multi_token import predict, predictors_of
from torchstone.model.state import State
from torchstone.model.tokens import Tokens, pick
from torchstone.model.transformer import Transformer

__all__ = ["Drafter", "check_drafts", "padded"]


def check_drafts(model: Transformer) -> None:
    """Refuse a model that cannot draft, or cannot take back what it read.

    Raises:
        TorchstoneError: it has no modules that predict further tokens, or a part whose decode state does not rewind.
    """
    predictors = predictors_of(model)
    if not predictors:
        raise TorchstoneError("draft: mtp needs a model with predictors (model.stack: {kind: multi_token})")
    states = [model.state(1, 1), *(State(predictor.state_spec(), 1, 1) for predictor in predictors)]  # type: ignore[operator]
    for state in states:
        stuck = next((path for path, part in state.parts.items() if not part.rewinds), None)
        if stuck is not None:
            raise TorchstoneError(
                f"draft: the state of {stuck} is {state.slots[stuck][0].growth} and cannot take back drafts that fail"
            )


class Drafter:
    """Drafts for the rows of one batch.

    Args:
        model: of stack multi_token.
        rows: B.
        extent: tokens that the modules' caches have room for at first.
        cache_bits: as of `State`.
    """

    def __init__(self, model: Transformer, rows: int, extent: int, cache_bits: int | None = None) -> None:
        self.model = model
        weight = next(model.parameters())
        self.states = [
            State(predictor.state_spec(), rows, extent, weight.dtype, weight.device, cache_bits=cache_bits)  # type: ignore[operator]
            for predictor in predictors_of(model) or ()
        ]
        self.held = [[0] * rows for _ in range(len(self.states) + 1)]
        """Positions of each row that are certain in the model's own cache, and in each module's."""
        self.before = [weight.new_zeros(rows, 1, model.spec.width) for _ in self.states]
        """For each module the hidden state that the one before it gave at the last certain position of that one."""

    @property
    def depth(self) -> int:
        """D, drafts at once."""
        return len(self.states)

    def keep(self, rows: Sequence[int]) -> None:
        """Let the other rows go."""
        rows_N = torch.tensor(rows, device=self.before[0].device)
        self.states = [state.fork(rows_N) for state in self.states]
        self.before = [x_B1D[rows_N] for x_B1D in self.before]
        self.held = [[each[b] for b in rows] for each in self.held]

    @torch.no_grad()
    def draft(
        self,
        texts: Sequence[Sequence[int]],
        hidden_BTD: torch.Tensor,
        choose: Callable[[torch.Tensor, list[list[int]]], list[int]],
    ) -> list[list[int]]:
        """D tokens after each text.

        Args:
            texts: all tokens of each row; the model has read all but the newest.
            hidden_BTD: of the model, at the positions that it read since the last call; what is right of a row's last
                certain position is not looked at.
            choose: a token for each row from logits (B, V) and the texts with the drafts so far.
        """
        grown = [list(text) for text in texts]
        read = [len(text) - 1 for text in texts]
        ends = [read]
        for k, state in enumerate(self.states, 1):
            first, base = self.held[k], self.held[k - 1]
            pieces = [text[a + k : n + k] for text, a, n in zip(grown, first, read, strict=True)]
            ids_BT, valid_BT = padded(pieces, hidden_BTD.device)
            both_BTD = torch.cat([self.before[k - 1].to(hidden_BTD.dtype), hidden_BTD], 1)  # column c is base - 1 + c
            start = torch.tensor([a - b + 1 for a, b in zip(first, base, strict=True)], device=ids_BT.device)
            at_BT = start[:, None] + torch.arange(ids_BT.shape[1], device=ids_BT.device)
            last = torch.tensor([e - b for e, b in zip(ends[-1], base, strict=True)], device=ids_BT.device)
            self.before[k - 1] = pick(both_BTD, last)
            if state.longest + ids_BT.shape[1] > state.extent:
                state.extend(max(2 * state.extent, state.longest + ids_BT.shape[1]))
            tokens = Tokens.of(ids_BT, valid=valid_BT)
            hidden_BTD, _ = predict(self.model, k, _columns(both_BTD, at_BT), tokens, state)
            ends.append([max(0, n + 1 - k) for n in read])
            state.truncate(torch.tensor(ends[-1], device=ids_BT.device))
            newest = tokens.newest(len(texts))
            logits_BV = logits_of(self.model, pick(hidden_BTD, newest), tokens.pick(newest))[:, -1]
            for text, token in zip(grown, choose(logits_BV, grown), strict=True):
                text.append(token)
        self.held = ends
        return [text[-self.depth :] for text in grown]


def logits_of(model: Transformer, hidden_BTD: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """(B, T, V) of the model's head."""
    head: VocabularyHead = model.vocabulary_head()
    return head(hidden_BTD, tokens, model.embedding.table())


def padded(
    rows: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids (B, T) padded on the right, and which are no padding; None if all rows are equally long."""
    T = max(map(len, rows))
    ids_BT = torch.tensor([[*row, *[0] * (T - len(row))] for row in rows], device=device)
    length_B = torch.tensor([len(row) for row in rows], device=device)
    if bool((length_B == T).all()):
        return ids_BT, None
    return ids_BT, torch.arange(T, device=device)[None] < length_B[:, None]


def _columns(x_BTD: torch.Tensor, at_BT: torch.Tensor) -> torch.Tensor:
    """Columns of each row, (B, T, D); beyond the last one, the last one."""
    at_BT = at_BT.clamp(max=x_BTD.shape[1] - 1)
    return x_BTD.gather(1, at_BT[..., None].expand(-1, -1, x_BTD.shape[-1]))
