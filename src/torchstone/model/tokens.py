"""Tokens: integer columns beside the hidden states, from which masks, positions and routers are derived.

Shapes: B rows (or 1 where all rows agree), T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

__all__ = ["Tokens", "pick"]


@dataclass(frozen=True)
class Tokens:
    """Columns (B|1, T). None means the simplest thing that the column can say.

    Attributes:
        index: order in the row's history: what causality and cache slots go by. None: 0, 1, 2, ... (from the state's
            length when decoding).
        start: `index` of the first token of the token's document; it *is* the document's identity. None: one document.
        position: what position encodings see. None: ``index - start``.
        ids: token ids.
        segment: token types (BERT's sentence A and B).
        modality: which kind of input a token is; multiway feed-forwards go by it.
        role: a label from which a mask term is derived (UniLM).
        valid: False for padding. None: no padding.
        offset: a number added to every score of this key (structured prompting's log M).
    """

    index: torch.Tensor = None  # type: ignore[assignment]
    start: torch.Tensor | None = None
    position: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    segment: torch.Tensor | None = None
    modality: torch.Tensor | None = None
    role: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    @classmethod
    def of(cls, ids_BT: torch.Tensor, **columns: torch.Tensor | None) -> Tokens:
        """Tokens of `ids_BT`, with `index` counting from 0 and any other columns."""
        return cls.blank(ids_BT.shape[1], ids_BT.device, ids=ids_BT, **columns)

    @classmethod
    def blank(cls, length: int, device: torch.device | str = "cpu", **columns: torch.Tensor | None) -> Tokens:
        """`length` tokens of which only the order is known."""
        columns.setdefault("index", torch.arange(length, device=device)[None])
        return cls(**columns)  # type: ignore[arg-type]

    @property
    def where(self) -> torch.Tensor:
        """Positions (B|1, T) as position encodings see them. Padding on the left does not count."""
        if self.position is not None:
            return self.position
        if self.start is not None:
            return self.index - self.start
        return self.index

    def _columns(self) -> dict[str, torch.Tensor]:
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def slice(self, a: int, b: int) -> Tokens:
        """Tokens a..b (exclusive)."""
        return replace(self, **{name: value[:, a:b] for name, value in self._columns().items()})

    def newest(self, rows: int) -> torch.Tensor | None:
        """Columns (B,) of the last valid token of each of `rows` rows; None where that is every row's last column."""
        if self.valid is None:
            return None
        order_T = torch.arange(self.index.shape[1], device=self.index.device)
        return torch.where(self.valid.expand(rows, -1), order_T, 0).amax(1)

    def pick(self, at_B: torch.Tensor | None) -> Tokens:
        """One token per row, at column `at_B` of `newest`: (B, 1) columns."""
        if at_B is None:
            return self.slice(self.index.shape[1] - 1, self.index.shape[1])
        return self.take(torch.arange(at_B.shape[0], device=at_B.device), at_B[:, None])

    def take(self, row_N: torch.Tensor, at_NC: torch.Tensor) -> Tokens:
        """Tokens at columns `at_NC` of rows `row_N`: (N, C) columns."""
        found = {
            name: value[:, at_NC][0] if value.shape[0] == 1 else value[row_N[:, None], at_NC]
            for name, value in self._columns().items()
        }
        return replace(self, **found)


def pick(x_BTD: torch.Tensor, at_B: torch.Tensor | None) -> torch.Tensor:
    """What stands at column `at_B` of each row, as `Tokens.pick` takes it: (B, 1, D)."""
    if at_B is None:
        # contiguous: a strided row would make the head's product one of B matrices, each with a weight of its own
        return x_BTD[:, -1:].contiguous()
    return x_BTD[torch.arange(x_BTD.shape[0], device=x_BTD.device), at_B][:, None]
