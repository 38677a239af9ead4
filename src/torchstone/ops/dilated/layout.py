"""Which tokens a dilated pattern keeps, and where they stand: integers alone, made once a forward for all layers.

Pattern (w, r) cuts a document into segments of w places. Of a segment, a head of offset s keeps the places s, s + r,
s + 2r, ... and attends among them. What is kept is laid out as n blocks of c queries with W keys each:

- `_aligned`, for rows that are one document: a block is a segment, its keys are its queries. Nothing is masked but what
  the causal flag masks.
- `_windows`, for packed documents, padding and chunks with a past: the kept tokens of a row in order, c queries a
  block, and of the kept keys the window that holds the segments of all of them. Segments and order are a mask, block by
  block.
- `_single`, for one token a row: its segment's kept keys up to itself.

Shapes: B rows (or 1), T queries, S keys, O different offsets, n blocks, c queries and W keys of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

__all__ = ["Layout", "Marks", "Pattern", "Plan", "plan"]

_BLOCK = 1024
"""Queries of a block, at most, where blocks have masks: more would not be faster, and a mask is held for one block."""
_LARGEST = 4096
"""Kept tokens of a segment beyond which an aligned block is cut up, unless a kernel needs no matrix for it."""
_FAR = 1 << 32
"""Above any index, so that a document and a segment of it are one number."""


Exchange = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Keys and values (B, H, c, K) of this rank -> (B H, W, K), those of all ranks that a query of this one may see."""


@dataclass(frozen=True)
class Marks:
    """What is known of tokens, in columns (B|1, T).

    Attributes:
        order: order in the row's history, by which causality goes.
        document: a number for the document that a token belongs to.
        place: place in the document, from 0, by which segments go.
        valid: False for padding; None: no padding.
    """

    order: torch.Tensor
    document: torch.Tensor
    place: torch.Tensor
    valid: torch.Tensor | None = None

    def segment(self, length: int) -> torch.Tensor:
        """(B|1, T): a number for the document and the segment of it."""
        return self.document * _FAR + self.place.div(length, rounding_mode="floor")

    def kept(self, length: int, dilation: int, offset: int) -> torch.Tensor:
        """(B|1, T): whether a head of this offset keeps the token."""
        kept = self.place % length % dilation == offset
        return kept if self.valid is None else kept & self.valid


@dataclass(frozen=True)
class Pattern:
    """Segments of `length` places, every `dilation`-th of them kept, from `offsets[h]` on by head h."""

    length: int
    dilation: int
    offsets: tuple[int, ...]

    @property
    def used(self) -> list[int]:
        """Different offsets."""
        return sorted(set(self.offsets))

    @property
    def slot(self) -> list[int]:
        """For each head the number of its offset among those used."""
        return [self.used.index(offset) for offset in self.offsets]


@dataclass(frozen=True)
class Layout:
    """Where the kept tokens of one pattern stand.

    Attributes:
        q_at, k_at: (B|1, O, n, c) and (B|1, O, n, W), columns of queries and keys; -1 where there is none.
        q_segment, k_segment, q_order, k_order: of those; segment -1 and -2 where there is none. None: no mask is needed
            besides the causal flag.
        exchange: fetches the keys that other ranks hold; None where all are at hand.
    """

    q_at: torch.Tensor
    k_at: torch.Tensor
    q_segment: torch.Tensor | None = None
    k_segment: torch.Tensor | None = None
    q_order: torch.Tensor | None = None
    k_order: torch.Tensor | None = None
    exchange: Exchange | None = None


@dataclass(frozen=True)
class Plan:
    """All that a forward of dilated attention needs besides queries, keys and values."""

    q: Marks
    k: Marks
    patterns: tuple[Pattern, ...]
    causal: bool
    layouts: tuple[Layout, ...]


def plan(
    q: Marks,
    k: Marks,
    patterns: Sequence[Pattern],
    *,
    causal: bool,
    own_BT: torch.Tensor | None = None,
    aligned: bool = False,
    flags: bool = True,
) -> Plan:
    """Layouts of all patterns.

    Args:
        q, k: marks of queries and keys. A document's tokens stand in order, and each query is a key too.
        causal: whether no query sees a later key.
        own_BT: (B|1, T), the column of each query among the keys; None means its own column.
        aligned: the keys are the queries, and the place of each is its column.
        flags: False asks for masks everywhere, because scores get a bias.
    """
    T, device = q.order.shape[1], q.order.device
    own = torch.arange(T, device=device)[None] if own_BT is None else own_BT
    layouts = []
    for pattern in patterns:
        w = min(pattern.length, k.order.shape[1])
        held = -(-w // pattern.dilation)
        # under the causal flag, what is missing at the end of a segment is later than all that is there
        bare = flags and (causal or (T % w == 0 and w % pattern.dilation == 0))
        if T == 1 and causal and not aligned:
            layouts.append(_single(pattern, q, k, own, held))
        elif aligned and (held <= _LARGEST or (bare and device.type == "cpu")):
            layouts.append(_aligned(pattern, q, bare))
        else:
            layouts.append(_windows(pattern, q, k, own, held, causal))
    return Plan(q, k, tuple(patterns), causal, tuple(layouts))


def _marked(pattern: Pattern, q: Marks, k: Marks, q_at: torch.Tensor, k_at: torch.Tensor) -> Layout:
    """The layout of these columns, with what its masks are made from."""

    def of(column: torch.Tensor, at: torch.Tensor, none: int) -> torch.Tensor:
        B = max(column.shape[0], at.shape[0])
        flat = at.expand(B, -1, -1, -1).flatten(1)
        found = column.expand(B, -1).gather(1, flat.clamp(min=0))
        return torch.where(flat < 0, none, found).unflatten(1, at.shape[1:])

    return Layout(
        q_at,
        k_at,
        of(q.segment(pattern.length), q_at, -1),
        of(k.segment(pattern.length), k_at, -2),
        of(q.order, q_at, -1),
        of(k.order, k_at, -1),
    )


def _aligned(pattern: Pattern, q: Marks, bare: bool) -> Layout:
    T, device = q.order.shape[1], q.order.device
    w, r = min(pattern.length, T), pattern.dilation
    inside_Oc = torch.tensor(pattern.used, device=device)[:, None] + torch.arange(0, w, r, device=device)
    at_Onc = inside_Oc[:, None] + torch.arange(0, T, w, device=device)[:, None]
    at = torch.where((inside_Oc[:, None] < w) & (at_Onc < T), at_Onc, -1)[None]
    return Layout(at, at) if bare else _marked(pattern, q, q, at, at)


def _compact(kept_BOS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of the kept tokens in order (B, O, S), and the number of kept tokens up to each column (B, O, S)."""
    S = kept_BOS.shape[-1]
    upto = kept_BOS.long().cumsum(-1)
    column = torch.arange(S, device=kept_BOS.device).expand(kept_BOS.shape)
    listed = column.new_zeros(*kept_BOS.shape[:-1], S + 1)
    listed = listed.scatter(-1, torch.where(kept_BOS, upto - 1, S), column)  # the last one takes what is not kept
    return listed[..., :S], upto


def _windows(pattern: Pattern, q: Marks, k: Marks, own: torch.Tensor, held: int, causal: bool) -> Layout:
    w, r = pattern.length, pattern.dilation
    listed_q, upto_q = _compact(torch.stack([q.kept(w, r, s) for s in pattern.used], 1))
    listed_k, upto_k = _compact(torch.stack([k.kept(w, r, s) for s in pattern.used], 1))
    B, T = max(listed_q.shape[0], listed_k.shape[0]), listed_q.shape[-1]
    listed_q, upto_q, listed_k, upto_k = (x.expand(B, -1, -1) for x in (listed_q, upto_q, listed_k, upto_k))
    c = min(held, T, _BLOCK)
    # how many are kept depends on the documents; compiled code takes the most that there can be
    most = T if torch.compiler.is_compiling() else max(1, int(upto_q[..., -1].amax()))
    n = -(-most // c)
    listed_q = F.pad(listed_q, (0, max(0, n * c - T)))[..., : n * c]
    there_q = torch.arange(n * c, device=listed_q.device) < upto_q[..., -1:]
    first = own.expand(B, -1)[:, None].expand(-1, len(pattern.used), -1).gather(2, listed_q[..., ::c])
    before = upto_k.gather(2, first) - 1  # kept keys before each block's first query
    # a segment holds at most `held`: those of the first query's before it, of the last query's up to it or after it
    width = held - 1 + c + (0 if causal else held - 1)
    rank = before[..., None] - (held - 1) + torch.arange(width, device=first.device)
    there_k = (rank >= 0) & (rank < upto_k[..., -1:, None]) & there_q[..., ::c, None]
    k_at = listed_k.gather(2, rank.clamp(0, listed_k.shape[-1] - 1).flatten(2)).view_as(rank)
    q_at = torch.where(there_q, listed_q, -1).unflatten(-1, (n, c))
    return _marked(pattern, q, k, q_at, torch.where(there_k, k_at, -1))


def _single(pattern: Pattern, q: Marks, k: Marks, own: torch.Tensor, held: int) -> Layout:
    w, r = pattern.length, pattern.dilation
    kept_BO = torch.cat([q.kept(w, r, s) for s in pattern.used], 1)
    back = r * torch.arange(held, device=own.device)
    k_at = torch.where(back <= q.place % w, own - back, -1)[:, None, None]  # (B, 1, 1, held)
    q_at = torch.where(kept_BO, 0, -1)[..., None, None]
    return _marked(pattern, q, k, q_at, k_at.expand(-1, len(pattern.used), -1, -1))
