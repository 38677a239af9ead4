"""Bank: keys and values of tokens long past, which a layer looks up by content (LongMem, Wang et al. 2023, arXiv
2306.07174, section 2.3).

Tokens lie in chunks. A chunk's index is the mean of its keys; a query takes the chunks with the largest inner products
(all are compared, or FAISS looks for them) and attends to their tokens. Nothing in a bank depends on a parameter that
trains, or is differentiated.

Each row of a batch has a memory of its own. It is bounded: when it is full, a new chunk takes the oldest one's place.

Shapes: B rows, R stored rows, H query heads, G key/value heads, T tokens, N chunks, C tokens of a chunk, M chosen
chunks, K head dimension.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from torchstone import ops
from torchstone.errors import TorchstoneError
from torchstone.model.index import build_index, require, search

__all__ = ["Bank"]

_SCORES = 1 << 24
"""Scores of queries and chunks that exist at once."""
_NAMES = ("k_RGNCK", "v_RGNCK", "mean_RGNK", "written_R")


class Bank:
    """Memory of some rows.

    Args:
        rows: of the batch.
        heads, dim: key/value heads and their dimension.
        tokens: that a row holds at most, a multiple of `chunk`.
        chunk: tokens that are looked up together.
        dtype, device: of keys and values.
        index: what finds the chunks: "exact", or an index of FAISS: "flat" finds the same, "hnsw" may miss some.

    Raises:
        TorchstoneError: `tokens` is not a positive multiple of `chunk`; FAISS is not installed.
    """

    def __init__(
        self,
        rows: int,
        heads: int,
        dim: int,
        *,
        tokens: int,
        chunk: int = 4,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        index: Literal["exact", "flat", "hnsw"] = "exact",
    ) -> None:
        if index != "exact":
            require()
        if chunk < 1 or tokens < chunk or tokens % chunk:
            raise TorchstoneError(f"memory.tokens: needs a positive multiple of the chunk of {chunk}, got {tokens}")
        shape = (rows, heads, tokens // chunk, chunk, dim)
        self.k_RGNCK = torch.zeros(shape, dtype=dtype, device=device)
        self.v_RGNCK = torch.zeros(shape, dtype=dtype, device=device)
        self.mean_RGNK = torch.zeros((*shape[:3], dim), dtype=dtype, device=device)
        self.written_R = torch.zeros(rows, dtype=torch.int64)
        """Chunks that a row was ever given: chunk i lies in slot i mod N. On the host."""
        self.row_B = list(range(rows))
        """Stored row of each row of the batch."""
        self.reads_only = False
        self._pending: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None
        self._version = 0
        self.index = index
        self._indexes: dict[tuple[int, int], Any] = {}
        """Of FAISS, by stored row and head, until the row changes. Readers share them."""

    @property
    def chunk(self) -> int:
        """C."""
        return self.k_RGNCK.shape[3]

    @property
    def capacity(self) -> int:
        """N, the chunks that a row holds at most."""
        return self.k_RGNCK.shape[2]

    def size(self, b: int) -> int:
        """Chunks that row b of the batch holds."""
        return min(int(self.written_R[self.row_B[b]]), self.capacity)

    def bytes(self) -> int:
        """Bytes held, indexes included."""
        return sum(x.numel() * x.element_size() for x in (self.k_RGNCK, self.v_RGNCK, self.mean_RGNK))

    def tensors(self) -> dict[str, torch.Tensor]:
        """What it holds, by name, for a file."""
        return {name: getattr(self, name) for name in _NAMES}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Become the bank that gave these `tensors()`.

        Raises:
            TorchstoneError: that bank had other sizes or another type.
        """
        own = self.tensors()
        if {name: (x.shape, x.dtype) for name, x in tensors.items()} != {n: (x.shape, x.dtype) for n, x in own.items()}:
            raise TorchstoneError("bank: these tensors are no memory of this model and this number of rows")
        for name, x in own.items():
            x.copy_(tensors[name])
        self._changed(range(len(self.written_R)))

    def _changed(self, stored: Iterable[int]) -> None:
        self._version += 1
        for key in [key for key in self._indexes if key[0] in stored]:
            del self._indexes[key]

    def arguments(self) -> dict[str, Any]:
        """Of a model's forward: see `torchstone.model.carry.Carry`."""
        return {"bank": self}

    def reader(self, rows: Sequence[int]) -> Bank:
        """A bank whose row n is this one's row `rows[n]`: it reads the same memory and never changes it."""
        twin = copy.copy(self)
        twin.row_B, twin.reads_only, twin._pending = [self.row_B[row] for row in rows], True, None
        return twin

    # -- writing

    def hold(self, k_BGTK: torch.Tensor, v_BGTK: torch.Tensor, valid_BT: torch.Tensor | None) -> None:
        """Keep the keys (before any rotation) and values of a forward for `commit`. `valid_BT` (B|1, T) False is
        padding on the right."""
        if not self.reads_only:
            self._pending = k_BGTK.detach(), v_BGTK.detach(), valid_BT

    def commit(self) -> None:
        """Put what the last forward held into the memory; after its backward pass, which may look things up again.

        Tokens at the end that fill no chunk are left out.

        Raises:
            TorchstoneError: there was no forward, or another number of rows in it.
        """
        if self._pending is None:
            raise TorchstoneError("bank: nothing to commit; a forward with this bank comes first")
        (k, v, valid), self._pending = self._pending, None
        if k.shape[0] != len(self.row_B):
            raise TorchstoneError(f"bank: {k.shape[0]} rows in the forward, {len(self.row_B)} in the bank")
        length_B = torch.full((k.shape[0],), k.shape[2]) if valid is None else valid.expand(k.shape[0], -1).sum(1).cpu()
        for b, length in enumerate(length_B.tolist()):
            r, first = self.row_B[b], max(0, length // self.chunk - self.capacity)
            new = slice(first * self.chunk, length // self.chunk * self.chunk)
            k_GNCK, v_GNCK = (x[b, :, new].unflatten(1, (-1, self.chunk)) for x in (k, v))
            start = int(self.written_R[r]) + first
            slots = torch.arange(start, start + k_GNCK.shape[1], device=k.device) % self.capacity
            self.k_RGNCK[r, :, slots] = k_GNCK.to(self.k_RGNCK.dtype)
            self.v_RGNCK[r, :, slots] = v_GNCK.to(self.v_RGNCK.dtype)
            mean_GNK = ops.at_least_float32(self.k_RGNCK[r, :, slots]).mean(2)
            self.mean_RGNK[r, :, slots] = mean_GNK.to(self.mean_RGNK.dtype)
            self.written_R[r] += length // self.chunk
        self._changed(set(self.row_B))

    def forget(self, rows: Sequence[int] | None = None) -> None:
        """Empty the memory of some rows of the batch, or of all: at the end of a document."""
        for b in range(len(self.row_B)) if rows is None else rows:
            self.written_R[self.row_B[b]] = 0
        self._changed(set(self.row_B))

    # -- reading

    def search(self, b: int, q_HTK: torch.Tensor, chunks: int) -> torch.Tensor:
        """For each query of row b the chunks with the largest inner products of query and index, (H, T, M) slots; M is
        `chunks`, or as many as there are. Query heads of a group search among its keys."""
        (H, T, K), G = q_HTK.shape, self.mean_RGNK.shape[1]
        mean_GNK = ops.at_least_float32(self.mean_RGNK[self.row_B[b], :, : self.size(b)])
        q_GQK = ops.at_least_float32(q_HTK).reshape(G, H // G * T, K)
        count = min(chunks, self.size(b))
        if self.index != "exact":
            best_GQM = torch.stack([self._find(b, g, q_GQK[g], mean_GNK[g], count) for g in range(G)])
        if self.index == "exact" or bool((best_GQM < 0).any()):
            best_GQM = (q_GQK @ mean_GNK.transpose(1, 2)).topk(count, -1).indices
        return best_GQM.reshape(H, T, -1)

    def _find(self, b: int, g: int, q_QK: torch.Tensor, mean_NK: torch.Tensor, count: int) -> torch.Tensor:
        where = self.row_B[b], g
        if where not in self._indexes:
            assert self.index != "exact"
            self._indexes[where] = build_index(self.index, mean_NK)
        return search(self._indexes[where], q_QK, count)

    def attend(
        self, q_BHTK: torch.Tensor, chunks: int, *, scale: float, softcap: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention (B, H, T, K) of each query to the tokens of its `chunks` best chunks, and which rows (B,) hold any
        at all; the others get zeros.

        Raises:
            TorchstoneError: another number of rows than the bank's.
        """
        B, H, T, K = q_BHTK.shape
        if len(self.row_B) != B:
            raise TorchstoneError(f"bank: {B} rows in the forward, {len(self.row_B)} in the bank")
        version = self._version

        def one(q_HtK: torch.Tensor, b: int) -> torch.Tensor:
            if self._version != version:
                raise TorchstoneError("bank: changed between a forward and its backward pass; commit after the latter")
            return self._attend(b, q_HtK, chunks, scale, softcap)

        rows = []
        for b in range(B):
            if not self.size(b):
                rows.append(torch.zeros_like(q_BHTK[b]))
                continue
            block, pieces = max(1, _SCORES // (H * max(self.size(b), chunks * self.chunk * K))), []
            for a in range(0, T, block):
                q_HtK = q_BHTK[b, :, a : a + block]
                if torch.is_grad_enabled() and q_HtK.requires_grad:
                    # what was looked up is looked up again, rather than kept for every query
                    pieces.append(checkpoint(one, q_HtK, b, use_reentrant=False, preserve_rng_state=False))
                else:
                    pieces.append(one(q_HtK, b))
            rows.append(torch.cat(pieces, 1))
        return torch.stack(rows), torch.tensor([self.size(b) > 0 for b in range(B)], device=q_BHTK.device)

    def _attend(self, b: int, q_HTK: torch.Tensor, chunks: int, scale: float, softcap: float | None) -> torch.Tensor:
        (H, T, K), r, G = q_HTK.shape, self.row_B[b], self.mean_RGNK.shape[1]
        best_GQM = self.search(b, q_HTK.detach(), chunks).reshape(G, H // G * T, -1)
        group_G11 = torch.arange(G, device=q_HTK.device)[:, None, None]
        k_GQSK, v_GQSK = (
            ops.at_least_float32(x[r][group_G11, best_GQM].flatten(2, 3)) for x in (self.k_RGNCK, self.v_RGNCK)
        )
        q_GQ1K = ops.at_least_float32(q_HTK).reshape(G, -1, 1, K)
        scores_GQ1S = scale * (q_GQ1K @ k_GQSK.transpose(-1, -2))
        if softcap is not None:
            scores_GQ1S = softcap * torch.tanh(scores_GQ1S / softcap)
        return (scores_GQ1S.softmax(-1) @ v_GQSK).reshape(H, T, K).to(q_HTK.dtype)
