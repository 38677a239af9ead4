"""`TorchstoneCache`: declared decode state behind transformers' cache interface."""

from __future__ import annotations

import inspect
from typing import ClassVar

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from torchstone.errors import TorchstoneError
from torchstone.model.state import State
from torchstone.model.transformer import Transformer

__all__ = ["CACHE", "TorchstoneCache"]

CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
"""What this version of transformers calls the cache in `forward` and in outputs."""

_ROOM = 256
"""New tokens for which there is room at first; it doubles when it is full."""


class TorchstoneCache(Cache):
    """A `State`, and the number of columns that the caller has fed.

    Rows of the state have lengths of their own, without padding; transformers counts columns, padding included. It is
    empty until the first forward, which knows the model and the rows.
    """

    is_compileable = False
    is_sliding: ClassVar[list[bool]] = [False]
    is_linear: ClassVar[list[bool]] = [False]

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: State | None = None
        self.columns = 0

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.parts)

    def __repr__(self) -> str:
        return f"TorchstoneCache(columns={self.columns}, rows={self.batch_size})"

    def prepare(self, transformer: Transformer, rows: int, tokens: int) -> State:
        """The state, with room for `tokens` more in each of `rows` rows.

        Raises:
            TorchstoneError: it holds another number of rows, or more tokens than the model has positions for.
        """
        if self.state is None:
            limit = transformer.limit
            extent = tokens + _ROOM if limit is None else max(tokens, min(tokens + _ROOM, limit))
            self.state = transformer.state(rows, extent)
        if self.state.rows != rows:
            raise TorchstoneError(f"cache: holds {self.state.rows} rows, and {rows} rows were given")
        need = self.state.longest + tokens
        if need > self.state.extent:
            self.state.extend(max(need, 2 * self.state.extent))
        return self.state

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first forward."""
        return -1 if self.state is None else self.state.rows

    @property
    def is_initialized(self) -> bool:
        """Whether a forward has been."""
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` works: no part keeps a ring or a recurrent sum."""
        return self.state is None or self.state.rewinds

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far, padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: it grows."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns that a mask over everything has, and the first of them."""
        return self.columns + query_length, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object) -> None:  # type: ignore[override]
        """Not for layers of others.

        Raises:
            TorchstoneError: always.
        """
        raise TorchstoneError("TorchstoneCache: holds the state of torchstone's models only")

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.columns = None, 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row n becomes what row ``beam_idx[n]`` was."""
        if self.state is not None:
            self.state = self.state.fork(beam_idx.to(self.state.length_B.device))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows: numbers, or a truth value a row."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies beside each other."""
        if self.state is not None:
            self.reorder_cache(torch.arange(self.state.rows).repeat_interleave(repeats))

    def crop(self, tokens: int) -> None:
        """Forget the last ``-tokens`` columns; a positive number is the columns that stay, as older versions say it.

        Raises:
            TorchstoneError: a part of the state cannot rewind.
        """
        tokens = int(tokens)  # some versions count in tensors
        gone = -tokens if tokens <= 0 else self.columns - tokens
        if self.state is not None and gone > 0:
            self.state.truncate((self.state.length_B - gone).clamp(min=0))
            self.columns = max(0, self.columns - gone)
