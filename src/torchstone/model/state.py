"""Decode state, declared as data.

A part declares slots; the engine owns the memory and lends each part a view. Per-row lengths live here and nowhere
else, so rows of different lengths, forking, truncation, snapshots and byte counts follow from the slots alone.

Shapes: B rows, T new tokens, S slots of a growing cache, W slots of a ring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy as shallow
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch

from torchstone.errors import TorchstoneError
from torchstone.model.bank import Bank
from torchstone.model.mask import Relation
from torchstone.model.tokens import Tokens
from torchstone.ops.packed import BITS, pack, packed_bytes, unpack

__all__ = ["Fixed", "Growing", "Packed", "PartState", "Recurrent", "Ring", "Slot", "State"]


@dataclass(frozen=True)
class Slot:
    """One named piece of decode state.

    Attributes:
        name: what it holds ("k", "v", "s").
        growth: growing: one entry a token. ring: the last `size` valid tokens. recurrent: one entry a row, replaced at
            every step. fixed: computed once (keys and values of an encoder's output).
        shape: shape of one entry.
        size: entries of a ring.
        dtype: None means the model's compute dtype; a floating one is the least that it is held in: a recurrent sum
            usually wants float32.
        head_axis: which axis of `shape` is split across tensor-parallel ranks, None if none is.
    """

    name: str
    growth: Literal["growing", "ring", "recurrent", "fixed"]
    shape: tuple[int, ...]
    size: int = 0
    dtype: torch.dtype | None = None
    head_axis: int | None = None

    def held_in(self, dtype: torch.dtype) -> torch.dtype:
        """What it is held in where the model computes in `dtype`."""
        if self.dtype is None:
            return dtype
        return torch.promote_types(self.dtype, dtype) if self.dtype.is_floating_point else self.dtype

    def entry(self, dtype: torch.dtype, cache_bits: int | None = None) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype that one entry is held in; `cache_bits` concern growing slots of floating numbers."""
        held = self.held_in(dtype)
        if cache_bits is not None and self.growth == "growing" and held.is_floating_point:
            return (packed_bytes(prod(self.shape), cache_bits),), torch.uint8
        return self.shape, held

    def bytes(self, dtype: torch.dtype, cache_bits: int | None = None) -> int:
        """Bytes of one entry: per token for a growing slot, per row for a recurrent one."""
        shape, held = self.entry(dtype, cache_bits)
        return prod(shape) * held.itemsize


class PartState:
    """Memory of one part: tensors by slot name. `rewinds` says whether the last tokens can be taken back."""

    rewinds = False

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def bytes(self) -> int:
        """Bytes held."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor by `change` of it: forking, snapshots, selection of rows."""
        self.tensors = {name: change(tensor) for name, tensor in self.tensors.items()}


class Growing(PartState):
    """(B, S, *shape) per slot: token i of a row lies in slot i."""

    rewinds = True

    def write(self, slots_BT: torch.Tensor, longest: int, **new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Store `new` (B, T, *shape) at `slots_BT` and give back the whole caches (B, longest, *shape), in order."""
        out, rows = [], torch.arange(slots_BT.shape[0], device=slots_BT.device)[:, None]
        for name, value in new.items():
            cache = self.tensors[name]
            cache.index_put_((rows, slots_BT), value.to(cache.dtype))
            out.append(cache[:, :longest])
        return tuple(out)


class Packed(Growing):
    """A growing cache whose numbers are held in `bits` bits on average: (B, S, bytes) per slot.

    What is read, also of tokens just written, is what is held. All of it is unpacked at each reading: this spares
    memory between readings, not time.
    """

    def __init__(
        self, tensors: dict[str, torch.Tensor], bits: int, entries: dict[str, tuple[tuple[int, ...], torch.dtype]]
    ) -> None:
        super().__init__(tensors)
        self.bits, self.entries = bits, entries

    def write(self, slots_BT: torch.Tensor, longest: int, **new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        packed = {name: pack(x.flatten(2), self.bits) if name in self.entries else x for name, x in new.items()}
        out = list(super().write(slots_BT, longest, **packed))
        for i, name in enumerate(new):
            if name in self.entries:
                shape, dtype = self.entries[name]
                out[i] = unpack(out[i], prod(shape), self.bits, dtype).unflatten(-1, shape)
        return tuple(out)


class Ring(PartState):
    """(B, W + 1, *shape) per slot and the tokens they belong to: token i lies in slot i mod W.

    `columns` (B, W + 1, 3) holds index, start and position; index -1 marks an empty slot. The last slot takes what
    must not be kept (padding, and all but the last W tokens of a long chunk), so that one write serves every case
    without a branch on values.
    """

    def write(self, q: Tokens, **new: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], Tokens]:
        """The keys that the new tokens may need (the old ring and the new tokens, or just the ring when T is 1) and
        their tokens; then the ring keeps the last W valid ones."""
        columns = self.tensors["columns"]
        B, W = columns.shape[0], columns.shape[1] - 1
        index = q.index.expand(B, -1)
        valid = torch.ones_like(index, dtype=torch.bool) if q.valid is None else q.valid.expand(B, -1)
        end = torch.where(valid, index, -1).amax(1, keepdim=True)
        keep = valid & (index > end - W)
        slots = torch.where(keep, index % W, W)
        rows = torch.arange(B, device=index.device)[:, None]
        start = torch.zeros_like(index) if q.start is None else q.start.expand(B, -1)
        mine = torch.stack([torch.where(valid, index, -1), start, q.where.expand(B, -1)], -1)
        out = []
        for name, value in (("columns", mine), *new.items()):
            cache = self.tensors[name]
            value = value.to(cache.dtype)
            seen = torch.cat([cache[:, :W], value], 1) if index.shape[1] > 1 else None
            cache.index_put_((rows, slots), value)
            out.append(cache[:, :W] if seen is None else seen)
        index, start, position = out[0].unbind(-1)
        tokens = Tokens(index.clamp(min=0), None if q.start is None else start, position, valid=index >= 0)
        return tuple(out[1:]), tokens


class Recurrent(PartState):
    """(B, *shape) per slot, replaced by every step."""

    def set(self, **new: torch.Tensor) -> None:
        """Store new values in place, so that a compiled step keeps its memory."""
        for name, value in new.items():
            self.tensors[name].copy_(value)


class Fixed(PartState):
    """(B, S_memory, *shape) per slot, computed at the first step; `rewinds` because nothing in it depends on steps."""

    rewinds = True

    def once(self, make: Callable[[], Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What was stored, or `make()` stored."""
        if not self.tensors:
            self.tensors = dict(make())
        return self.tensors


class State:
    """Decode state of a model for B rows.

    Args:
        slots: path of a part -> its slots, from ``model.state_spec()``.
        rows: B.
        extent: tokens a growing cache can hold.
        dtype, device: of the caches.
        static: caches are always used whole, under a mask, so that a compiled step never changes shape. False: views
            end at the longest row.
        cache_bits: bits a number, on average, that growing caches are held in; lossy. None: as `dtype` has them.

    Raises:
        TorchstoneError: `cache_bits` out of range.
    """

    def __init__(
        self,
        slots: Mapping[str, tuple[Slot, ...]],
        rows: int,
        extent: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        static: bool = False,
        cache_bits: int | None = None,
    ) -> None:
        if cache_bits is not None and (not isinstance(cache_bits, int) or cache_bits not in BITS):
            raise TorchstoneError(f"state.cache_bits: from {BITS[0]} to {BITS[-1]}, or None, got {cache_bits!r}")
        self.slots = dict(slots)
        self.extent = extent
        self.static = static
        self.length_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.start_BS: torch.Tensor | None = None
        self.position_BS: torch.Tensor | None = None
        self.offset_BS: torch.Tensor | None = None
        self.memory_tokens: Tokens | None = None
        self.bank: Bank | None = None
        """What rows look things up in: belongs to whoever put it there, and forks read it."""
        self.longest = 0
        """Length of the longest row: known to the host, never to a part."""
        self.uniform = True
        """Whether the host knows that all rows have `longest` tokens."""
        self.parts = {
            path: _allocate(part, rows, extent, dtype, device, cache_bits) for path, part in self.slots.items()
        }
        self._pending: tuple[torch.Tensor, int, bool] | None = None

    @property
    def rows(self) -> int:
        """B."""
        return self.length_B.shape[0]

    @property
    def reach(self) -> int:
        """One more than the largest position that a token has."""
        if self.position_BS is None or self.longest == 0:
            return self.longest
        held = torch.arange(self.longest, device=self.length_B.device) < self.length_B[:, None]
        return int(torch.where(held, self.position_BS[:, : self.longest], -1).max()) + 1

    def begin(self, tokens: Tokens) -> tuple[Tokens, Tokens, torch.Tensor, Relation]:
        """Queries with their index in the history, the keys of growing caches, slots (B, T), and the relation.

        `tokens.start` and `tokens.position`, where given, count in the row's whole history, not in this chunk. Where
        they are not, a token belongs to the document of the token before it, and has the next position.
        Padding must be on the right: a padding token's slot is written again by the next real one, and causality
        hides it until then.

        Raises:
            TorchstoneError: the new tokens do not fit.
        """
        T, device = tokens.index.shape[1], self.length_B.device
        if self.longest + T > self.extent:
            raise TorchstoneError(f"state: {self.longest} tokens and {T} more do not fit in an extent of {self.extent}")
        index = self.length_B[:, None] + torch.arange(T, device=device)
        start = self._column("start_BS", tokens.start, index)
        position = self._column("position_BS", tokens.position, index)
        self._column("offset_BS", tokens.offset, index)
        q = replace(tokens, index=index, start=start, position=position)
        S = self.extent if self.static else self.longest + T
        k = Tokens(
            torch.arange(S, device=device)[None],
            start=None if self.start_BS is None else self.start_BS[:, :S],
            position=None if self.position_BS is None else self.position_BS[:, :S],
            offset=None if self.offset_BS is None else self.offset_BS[:, :S],
        )
        relation: Relation = "general"
        if self.uniform and not self.static:
            relation = "same" if self.longest == 0 else "last" if T == 1 else "general"
        valid = tokens.valid
        added = torch.full_like(self.length_B, T) if valid is None else valid.expand(self.rows, -1).sum(1)
        self._pending = added, T, valid is None
        return q, k, index, relation

    def _column(self, name: str, new: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor | None:
        """A column of the history, kept beside the caches from the first token that needs it."""
        column = getattr(self, name)
        if new is None and column is None:
            return None
        if column is None:
            assert new is not None
            order = torch.arange(self.extent, device=index.device)
            column = (order if name == "position_BS" else torch.zeros_like(order, dtype=new.dtype)).repeat(self.rows, 1)
            setattr(self, name, column)
        if new is None:
            before = column.gather(1, (self.length_B - 1).clamp(min=0)[:, None])
            if name == "start_BS":
                new = before
            elif name == "position_BS":
                new = torch.where(self.length_B[:, None] > 0, before + 1 + index - self.length_B[:, None], index)
            else:
                new = torch.zeros_like(before)
        value = new.expand_as(index)
        column.index_put_((torch.arange(self.rows, device=index.device)[:, None], index), value)
        return value

    def end(self) -> None:
        """Count the tokens of the forward that `begin` started."""
        assert self._pending is not None
        added, T, full = self._pending
        self.length_B += added
        self.uniform = self.uniform and full
        self.longest = self.longest + T if full else int(self.length_B.max())
        self._pending = None

    def bytes(self) -> int:
        """Bytes held by all parts."""
        return sum(part.bytes() for part in self.parts.values())

    @property
    def rewinds(self) -> bool:
        """Whether `truncate` works: no part keeps a ring or a recurrent sum."""
        return all(part.rewinds for part in self.parts.values())

    def truncate(self, length: int | torch.Tensor) -> None:
        """Forget all tokens from `length` (one number or (B,)) on.

        Raises:
            TorchstoneError: a part cannot rewind; take a `snapshot` before the tokens instead.
        """
        if not self.rewinds:
            stuck = next(path for path, part in self.parts.items() if not part.rewinds)
            raise TorchstoneError(
                f"state of {stuck} is {self.slots[stuck][0].growth} and cannot be truncated; "
                "use snapshot() before the tokens and restore() after"
            )
        self.length_B = torch.minimum(self.length_B, torch.as_tensor(length, device=self.length_B.device))
        self.longest = int(self.length_B.max())
        self.uniform = bool((self.length_B == self.longest).all())

    def extend(self, extent: int) -> None:
        """Make room for `extent` tokens a row; what is held stays."""
        more = extent - self.extent
        if more <= 0:
            return

        def longer(tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor, tensor.new_zeros(tensor.shape[0], more, *tensor.shape[2:])], 1)

        for part in self.parts.values():
            if isinstance(part, Growing):
                part.rows(longer)
        self.start_BS = None if self.start_BS is None else longer(self.start_BS)
        if self.position_BS is not None:
            order = torch.arange(self.extent, extent, device=self.position_BS.device)
            self.position_BS = torch.cat([self.position_BS, order.expand(self.rows, -1)], 1)
        self.offset_BS = None if self.offset_BS is None else longer(self.offset_BS)
        self.extent = extent

    def fork(self, rows_N: torch.Tensor) -> State:
        """A state of its own whose row n is this one's row `rows_N[n]`."""
        copy = self._copy(lambda tensor: tensor.index_select(0, rows_N))
        copy.bank = None if self.bank is None else self.bank.reader(rows_N.tolist())
        if not self.uniform:  # the longest row may be gone
            copy.longest = int(copy.length_B.max())
            copy.uniform = bool((copy.length_B == copy.longest).all())
        return copy

    def snapshot(self) -> State:
        """A state of its own with the same content."""
        return self._copy(torch.clone)

    @classmethod
    def joined(cls, states: Sequence[State], shared: int = 0) -> State:
        """A state of one row that holds the tokens of all rows of `states`, one row after another.

        Each keeps its keys, its values and its position; tokens that come later see them all.

        Args:
            states: of one model.
            shared: tokens at the beginning that are the same in all rows; the first row's are kept.

        Raises:
            TorchstoneError: a part keeps a ring, a recurrent sum or an encoder's output, in which the tokens have no
                entries of their own; documents in a row.
        """
        first = states[0]
        for path, slots in first.slots.items():
            if slots[0].growth != "growing":
                raise TorchstoneError(f"state of {path} is {slots[0].growth} and cannot be joined; growing ones can")
        if any(state.start_BS is not None for state in states):
            raise TorchstoneError("state: rows that hold several documents cannot be joined")
        rows = [(state, b, length) for state in states for b, length in enumerate(state.length_B.tolist())]

        def join(of: Callable[[State], torch.Tensor]) -> torch.Tensor:
            pieces = [of(state)[b, shared if n else 0 : length] for n, (state, b, length) in enumerate(rows)]
            return torch.cat(pieces)[None]

        def order(state: State) -> torch.Tensor:
            return torch.arange(state.extent, device=state.length_B.device).expand(state.rows, -1)

        position_BS = join(lambda state: order(state) if state.position_BS is None else state.position_BS)
        one = cls({}, 1, position_BS.shape[1], device=position_BS.device)
        one.slots, one.longest, one.position_BS = first.slots, one.extent, position_BS
        one.length_B += one.extent
        if any(state.offset_BS is not None for state in states):
            one.offset_BS = join(lambda s: torch.zeros_like(order(s)) if s.offset_BS is None else s.offset_BS)
        for path, slots in first.slots.items():
            names = [slot.name for slot in slots]
            twin = shallow(first.parts[path])
            twin.tensors = {x: join(lambda s, p=path, x=x: s.parts[p].tensors[x]) for x in names}  # type: ignore[misc]
            one.parts[path] = twin
        return one

    def _copy(self, change: Callable[[torch.Tensor], torch.Tensor]) -> State:
        copy = State.__new__(State)
        copy.__dict__.update(self.__dict__)
        copy.length_B = change(self.length_B)
        copy.start_BS = None if self.start_BS is None else change(self.start_BS)
        copy.position_BS = None if self.position_BS is None else change(self.position_BS)
        copy.offset_BS = None if self.offset_BS is None else change(self.offset_BS)
        if self.memory_tokens is not None:
            memory = {
                name: change(value.expand(self.rows, -1)) for name, value in self.memory_tokens._columns().items()
            }
            copy.memory_tokens = replace(self.memory_tokens, **memory)
        copy.parts = {}
        for path, part in self.parts.items():
            twin = shallow(part)
            twin.rows(change)
            copy.parts[path] = twin
        return copy


def _allocate(
    slots: tuple[Slot, ...],
    rows: int,
    extent: int,
    dtype: torch.dtype,
    device: torch.device | str,
    cache_bits: int | None,
) -> PartState:
    growth = slots[0].growth
    if any(slot.growth != growth for slot in slots):
        raise TypeError("the slots of one part grow alike; a part with two kinds of state has two children")
    if growth == "fixed":
        return Fixed({})
    if growth == "ring":
        W = slots[0].size + 1
        rings = {
            slot.name: torch.zeros(rows, W, *slot.shape, dtype=slot.held_in(dtype), device=device) for slot in slots
        }
        return Ring({"columns": torch.full((rows, W, 3), -1, dtype=torch.int64, device=device), **rings})
    lead = (rows, extent) if growth == "growing" else (rows,)
    tensors = {}
    for slot in slots:
        shape, held = slot.entry(dtype, cache_bits)
        tensors[slot.name] = torch.zeros(*lead, *shape, dtype=held, device=device)
    if growth == "recurrent":
        return Recurrent(tensors)
    if cache_bits is None:
        return Growing(tensors)
    plain = {slot.name: slot.entry(dtype) for slot in slots if slot.entry(dtype) != slot.entry(dtype, cache_bits)}
    return Packed(tensors, cache_bits, plain)
