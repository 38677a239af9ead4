"""From the caller's columns (ids, 2-D mask, positions) to `Tokens`, and back.

Shapes: B rows, T columns of the caller, N columns of ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchstone.errors import TorchstoneError
from torchstone.model.state import State
from torchstone.model.tokens import Tokens

__all__ = ["Columns", "arrange"]


@dataclass(frozen=True)
class Columns:
    """Tokens of one forward, and which column of the caller each of them is.

    Attributes:
        tokens: (B, N); padding, if there is any, on the right where a state wants it there.
        order_BN: the caller's column of each token; None where they are the same.
        width: T.
    """

    tokens: Tokens
    order_BN: torch.Tensor | None
    width: int

    def pick(self, x_BT: torch.Tensor) -> torch.Tensor:
        """Values (B, T, ...) of the caller's columns as ours (B, N, ...)."""
        if self.order_BN is None:
            return x_BT
        return x_BT[torch.arange(x_BT.shape[0], device=x_BT.device)[:, None], self.order_BN]

    def back(self, x_BN: torch.Tensor) -> torch.Tensor:
        """Values (B, N, ...) of tokens in the caller's columns (B, T, ...); 0 where a column was left out."""
        if self.order_BN is None:
            return x_BN
        out = x_BN.new_zeros(x_BN.shape[0], self.width, *x_BN.shape[2:])
        rows = torch.arange(x_BN.shape[0], device=x_BN.device)[:, None]
        return out.index_put((rows, self.order_BN), x_BN)


def arrange(
    rows: int,
    width: int,
    device: torch.device,
    ids_BT: torch.Tensor | None,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    segment_BT: torch.Tensor | None,
    state: State | None = None,
    past: int = 0,
) -> Columns:
    """The tokens of these columns.

    Positions that do not go up by one begin a new document, as collators that pack without padding say it; positions
    that merely count the tokens that are no padding say nothing. With a state, columns that are masked are left out.

    Args:
        rows, width, device: B, T, and where.
        ids_BT: token ids, if they are not given as embeddings.
        mask: (B, T), or (B, past + T) of which the last T count; 0 is padding.
        position_ids: (B|1, T).
        segment_BT: token types.
        state: decode state, if there is one.
        past: columns that it has seen.

    Raises:
        TorchstoneError: a mask or positions of another shape.
    """
    valid = _valid(mask, rows, width, past)
    columns = Columns(Tokens.blank(width, device), None, width)
    if state is not None and valid is not None:
        longest = max(1, int(valid.sum(1).max()))
        order_BN = torch.argsort((~valid).long(), dim=1, stable=True)[:, :longest]
        columns = Columns(Tokens.blank(longest, device), order_BN, width)
    if position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape[1] != width or position_ids.shape[0] not in (1, rows):
            raise TorchstoneError(f"position_ids: has shape {tuple(position_ids.shape)}, needs ({rows}, {width})")
        position_ids = columns.pick(position_ids.to(device).expand(rows, -1))
    kept = None if valid is None else columns.pick(valid)
    start, position = (None, None) if position_ids is None else _documents(position_ids, kept, state)
    tokens = Tokens.blank(
        columns.tokens.index.shape[1],
        device,
        ids=None if ids_BT is None else columns.pick(ids_BT),
        segment=None if segment_BT is None else columns.pick(segment_BT),
        valid=None if kept is None or bool(kept.all()) else kept,
        start=start,
        position=position,
    )
    return Columns(tokens, columns.order_BN, width)


def _valid(mask: torch.Tensor | None, rows: int, width: int, past: int) -> torch.Tensor | None:
    """Which of the new columns are no padding; None if all are."""
    if mask is None:
        return None
    allowed = {width, past + width}
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] not in allowed:
        got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TorchstoneError(
            f"attention_mask: needs one number a column, shape ({rows}, {max(allowed)}), 0 for padding; got {got}"
        )
    valid = mask[:, -width:] != 0
    return None if bool(valid.all()) else valid


def _documents(
    position_BN: torch.Tensor, valid: torch.Tensor | None, state: State | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`start` and `position` of `Tokens`; None for what a count of the tokens says already."""
    order_N = torch.arange(position_BN.shape[1], device=position_BN.device)
    real = torch.ones_like(position_BN, dtype=torch.bool) if valid is None else valid
    # column of the last real token before each, -1 where there is none
    before = torch.where(real, order_N, -1).cummax(1).values.roll(1, 1)
    before[:, 0] = -1
    follows = (before >= 0) & (position_BN == position_BN.gather(1, before.clamp(min=0)) + 1)
    begins = real & ~follows
    if bool((begins.sum(1) <= 1).all()):
        start, counted = None, real.long().cumsum(1) - 1
        if state is not None and state.longest:
            counted = counted + state.length_B[:, None]
            if state.start_BS is not None:
                counted = counted - state.start_BS.gather(1, (state.length_B - 1).clamp(min=0)[:, None])
    elif state is not None and state.longest:
        raise TorchstoneError("position_ids: with a cache that holds tokens, no new document can begin")
    else:
        start = torch.where(begins, order_N, 0).cummax(1).values
        counted = order_N - start
    # a state that keeps positions wants those of every token
    kept = state is not None and state.position_BS is not None
    return start, position_BN if kept or bool((position_BN != counted)[real].any()) else None
