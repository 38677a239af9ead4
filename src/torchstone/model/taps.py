"""Taps: record or replace any named intermediate value, for observation and intervention only.

    taps = Taps(record=["*.attention.probs"], replace={"decoder.layers.2.ffn.out": torch.zeros_like})
    model(ids, taps=taps); taps.seen["decoder.layers.0.attention.probs"]

A part says ``x = ctx.tap("probs", x)``; when nobody listens this is one comparison. A part may ask ``ctx.hears(name)``
before it makes a value that its fused kernel would not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

import torch

from torchstone.errors import TorchstoneError
from torchstone.ops.compiler import constant_for_compiler

__all__ = ["Taps"]


_FITTING: dict[tuple[tuple[str, ...], str], tuple[str, ...]] = {}


@constant_for_compiler
def _fitting(patterns: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The patterns that `name` fits, found once. A constant to compiled code, which cannot trace `fnmatch`."""
    if (patterns, name) not in _FITTING:
        _FITTING[patterns, name] = tuple(p for p in patterns if p == name or fnmatchcase(name, p))
    return _FITTING[patterns, name]


class Taps:
    """What to record and what to replace in one forward.

    Args:
        record: names or patterns (``*`` as in file names) of values to keep in `seen`.
        replace: name or pattern -> a tensor to put in its place, or a function of the value.
        detach: record values cut from the graph; False keeps them differentiable.
    """

    def __init__(
        self,
        record: Iterable[str] = (),
        replace: Mapping[str, torch.Tensor | Callable[[torch.Tensor], torch.Tensor]] | None = None,
        detach: bool = False,
    ) -> None:
        self.record = (record,) if isinstance(record, str) else tuple(record)
        self.replace = dict(replace or {})
        self.detach = detach
        self.seen: dict[str, torch.Tensor] = {}
        self._used: set[str] = set()

    def match(self, name: str) -> tuple[bool, tuple[str, ...]]:
        """Whether `name` is recorded, and the patterns that replace it."""
        recorded, replaced = _fitting(self.record, name), _fitting(tuple(self.replace), name)
        for pattern in (*recorded, *replaced):
            self._used.add(pattern)
        return bool(recorded), replaced

    def hears(self, name: str) -> bool:
        """Whether anyone records or replaces `name`."""
        recorded, replaced = self.match(name)
        return recorded or bool(replaced)

    def __call__(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """`x`, or what was asked for in its place."""
        recorded, replaced = self.match(name)
        for pattern in replaced:
            new = self.replace[pattern]
            new = new(x) if callable(new) and not isinstance(new, torch.Tensor) else new
            if new.shape != x.shape:
                raise TorchstoneError(
                    f"tap {name}: the replacement has shape {tuple(new.shape)}, the value has {tuple(x.shape)}"
                )
            x = new.to(x.dtype)
        if recorded:
            self.seen[name] = x.detach() if self.detach else x
        return x

    def unmatched(self) -> list[str]:
        """Patterns that no value has matched so far: after a forward, these name nothing in the model."""
        return [p for p in (*self.record, *self.replace) if p not in self._used]
