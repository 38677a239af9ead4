"""Context: what a sublayer may look at during a forward. Read-only; it never asks which model it is in.

Shapes: B rows, T queries, S keys, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from torchstone.keys import Key
from torchstone.model.bank import Bank
from torchstone.model.mask import BIDIRECTIONAL, CAUSAL, Lowered, Mask, Relation, Window, lower
from torchstone.model.taps import Taps
from torchstone.model.tokens import Tokens
from torchstone.ops import noise
from torchstone.ops.compiler import constant_for_compiler

if TYPE_CHECKING:
    from torchstone.model.position import Rotation
    from torchstone.ops.attention import Decay

__all__ = ["Aux", "Context", "Handoff", "Memory", "add_aux", "aux_of"]

Aux = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Name -> (sum, count), both scalars or vectors of one shape: balance losses, expert counts. Names that end in
``_loss`` are added to the objective, and their count is the number of valid tokens. Sums of equal names are added up
over layers, but for names that begin with a colon, which are a layer's own: "decoder.layers.3:load.0" once they leave
the model. What they come to over a training step, the layer's modules get in ``after_step``."""

_T = TypeVar("_T")


def add_aux(a: Aux, b: Aux) -> Aux:
    """Sums and counts of both."""
    if not a or not b:
        return a or b
    merged = dict(a)
    for name, (total, count) in b.items():
        merged[name] = (merged[name][0] + total, merged[name][1] + count) if name in merged else (total, count)
    return merged


def aux_of(path: str, aux: Aux) -> Aux:
    """`aux` as it leaves the module at `path`: names of a layer's own sums get the path before them."""
    if not any(":" in name for name in aux):
        return aux
    return {
        (path + name if name[0] == ":" else f"{path}.{name}" if ":" in name else name): pair
        for name, pair in aux.items()
    }


@constant_for_compiler
def _code(name: str) -> int:
    """A number for a name, for keys that are folded inside compiled code."""
    return Key(0).fold(name).value >> 2


class PositionModules(Protocol):
    """Position modules by key: a stack's `Positions`, or a dict."""

    def __getitem__(self, key: str, /) -> Any: ...


@dataclass(frozen=True)
class Memory:
    """What a decoder attends to besides itself: hidden states (B, S, D) and their tokens."""

    x: torch.Tensor | None
    tokens: Tokens


@dataclass(frozen=True)
class Handoff:
    """What one attention passes to later layers of the same forward; the stack decides who gets it.

    Attributes:
        k, v: keys and values (B, G, S, K), rotated as the giver rotated them, with the tokens they belong to.
        probs: probabilities (B, H, T, S), as the giver used them: what it dropped is 0.
        block_max: for each query the largest score in each block of keys (B, G, T, S / block_of).
        block_of: keys in a block.
        fresh: keys before any rotation, and values, of this forward's tokens alone (B, G, T, K).
        q: queries (B, H, T, K), rotated as the keys.
        key: key of the giver's dropout, for who makes its probabilities again; None outside training.
    """

    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    tokens: Tokens | None = None
    probs: torch.Tensor | None = None
    block_max: torch.Tensor | None = None
    block_of: int = 0
    fresh: tuple[torch.Tensor, torch.Tensor] | None = None
    q: torch.Tensor | None = None
    key: torch.Tensor | None = None


@dataclass(frozen=True)
class Context:
    """One forward as a part sees it.

    Attributes:
        q: tokens of this forward.  k: tokens a growing cache holds, `q` itself without a state.
        mask: who may see whom.  relation: what the host knows of q and k.
        slots: (B, T) cache slots that this forward's tokens are written to, None without a state.
        positions: the model's position modules by key.
        memory: the encoder's output, for cross-attention.
        key: 0-dimensional int64 key of this forward's dropout; None outside training.
        bank: keys and values of tokens long past, for layers that look things up.
        memo: values made once a forward (rotations, lowered masks), by name.
    """

    q: Tokens
    k: Tokens
    mask: Mask = field(default_factory=lambda: CAUSAL)  # a factory: torch 2.11 cannot compile a default of this class
    relation: Relation = "same"
    slots: torch.Tensor | None = None
    positions: PositionModules = field(default_factory=dict[str, Any])
    memory: Memory | None = None
    taps: Taps | None = None
    scope: str = ""
    key: torch.Tensor | None = None
    bank: Bank | None = None
    memo: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def alone(cls, x_BTD: torch.Tensor, causal: bool = True, positions: PositionModules | None = None) -> Context:
        """The context of a part used by itself: one sequence a row, no padding, no state."""
        tokens = Tokens.blank(x_BTD.shape[1], x_BTD.device)
        return cls(tokens, tokens, CAUSAL if causal else BIDIRECTIONAL, positions=positions or {})

    # -- taps

    def tap(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """`x`, or what a listener put in its place."""
        return x if self.taps is None else self.taps(f"{self.scope}.{name}" if self.scope else name, x)

    def hears(self, name: str) -> bool:
        """Whether a listener wants this value: only then does a part leave its fused kernel to make it."""
        return self.taps is not None and self.taps.hears(f"{self.scope}.{name}" if self.scope else name)

    def inside(self, name: str) -> Context:
        """The context of a named child: its taps and its dropout have names of their own."""
        if self.taps is None and self.key is None:
            return self
        scope = ""  # without listeners it stays empty: compiled code would be made anew for every layer's name
        if self.taps is not None:
            scope = f"{self.scope}.{name}" if self.scope else name
        key = None if self.key is None else noise.mix(self.key, _code(name))
        return replace(self, scope=scope, key=key)

    def newest(self, at_B: torch.Tensor | None) -> Context:
        """The context of one query a row, at column `at_B` of `q.newest`; keys stay. It has a memo of its own."""
        newest = at_B is None and self.relation != "general"
        slots = None
        if self.slots is not None:
            slots = self.slots[:, -1:] if at_B is None else self.slots.gather(1, at_B[:, None])
        return replace(self, q=self.q.pick(at_B), relation="last" if newest else "general", slots=slots, memo={})

    # -- made once a forward

    def once(self, name: str, make: Callable[[], _T]) -> _T:
        """`make()`, once a forward under this name."""
        if name not in self.memo:
            self.memo[name] = make()
        return self.memo[name]

    def lowered(
        self,
        window: int | None = None,
        position: str | None = None,
        keys: Tokens | None = None,
        name: str = "",
        flags: bool = True,
    ) -> Lowered:
        """The mask as a kernel takes it, with a window of the layer's own and the score bias of a position module.

        `keys` are the tokens of a cache with an order of its own (a ring), memoised under `name`. `flags` False asks
        for a matrix, whole or in blocks, where the layer has more to add to it.
        """
        name = f"lowered.{window}.{position}.{name}.{flags}"
        return self.once(name, lambda: self._lower(window, position, keys, flags))

    def _lower(self, window: int | None, position: str | None, keys: Tokens | None, flags: bool) -> Lowered:
        mask = self.mask if window is None else self.mask & Window(window)
        k, relation = (self.k, self.relation) if keys is None else (keys, "general")
        plain = position is None and k.offset is None
        low = lower(mask, self.q, k, relation, flags=plain and flags)
        if plain:
            return low

        def score(q: Tokens, k: Tokens, allowed: torch.Tensor | None) -> torch.Tensor:
            bias = None if position is None else self.positions[position].bias(q, k)
            if k.offset is not None:
                offset = k.offset[:, None, None, :].to(torch.get_default_dtype())
                bias = offset if bias is None else bias + offset
            assert bias is not None
            return bias if allowed is None else torch.where(allowed, bias, float("-inf"))

        if low.mask_of is not None:
            blocks = low.mask_of

            def mask_of(a: int, b: int) -> tuple[int, int, torch.Tensor | None]:
                first, last, allowed = blocks(a, b)
                return first, last, score(self.q.slice(a, b), k.slice(first, last), allowed)

            return Lowered(mask_of=mask_of)
        return Lowered(matrix_B1TS=score(self.q, k, low.matrix_B1TS))

    def rotation(self, key: str) -> Rotation | None:
        """Rotation of queries and of new keys by the position module `key`; caches hold rotated keys."""
        return self.once(f"rotation.{key}", lambda: self.positions[key].rotation(self.q.where))

    def decay(self, key: str, keys: Tokens | None = None, name: str = "") -> Decay | None:
        """How scores of rotated queries and keys fall with distance, by the position module `key`; `keys` and `name` as
        in `lowered`."""
        k = self.k if keys is None else keys
        return self.once(f"decay.{key}.{name}", lambda: self.positions[key].decay(self.q, k))

    # -- dropout

    def drop(self, x: torch.Tensor, rate: float, name: str, per_row: bool = False) -> torch.Tensor:
        """`x` with elements (or whole rows of the batch) dropped at `rate` and the rest scaled to keep the mean.

        The mask is a function of the context's key and `name` alone, so recomputing a forward repeats it.
        """
        if rate == 0.0 or self.key is None:
            return x
        key = noise.mix(self.key, _code(name))
        size = x.shape[0] if per_row else x.numel()
        kept = noise.uniform(key, size) >= rate
        kept = kept.view(-1, *[1] * (x.dim() - 1)) if per_row else kept.view(x.shape)
        return torch.where(kept, x / (1.0 - rate), 0.0)
