"""Site: where a part is built, and all that it may know of the model; and how parameters get their first values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from torchstone.keys import Key
from torchstone.spec import resolve

if TYPE_CHECKING:
    from torchstone.model.linear import Bias, LinearSpec
    from torchstone.model.norm import NormSpec
    from torchstone.model.position import PositionSpec
    from torchstone.model.residual import ResidualSpec

__all__ = ["Gives", "Initialise", "Site", "initialise", "parameter_name"]

Initialise = Callable[[torch.Tensor, str, torch.Generator], None]
"""Fills a weight (or one slice of a fused one) in place, given its role: "q", "k", "v", "out", "up", "gate", "down",
"embed", "head", "router", "position"."""


class _Positions(Protocol):
    def add(self, spec: PositionSpec, dim: int, heads: int, width: int, group: int) -> str: ...


@dataclass(frozen=True)
class Gives:
    """What a layer must hand to later ones; decided when the model is built."""

    keys_values: bool = False
    probs: bool = False
    block_max: int = 0
    fresh: bool = False
    queries_keys: bool = False


@dataclass(frozen=True)
class Site:
    """Where a part is built.

    Attributes:
        width: width of the stream.
        depths: layers of the encoder and of the decoder (0 where there is none).
        layer: this layer's number in its stack; None for what stands outside layers.
        causal: whether this stack is a decoder.
        memory_width: width of the memory that a cross-attention reads; None for self-attention.
        linear_spec, norm_spec, position_spec, residual_spec: the model's choices for this layer.
        dropout: rate at the places where each part's literature puts it.
        drop_path: rate at which this layer's sublayers are skipped per row (stochastic depth).
        gives: what this layer's attention hands to later ones.
        positions: the stack's registry of position modules; None when a part is used alone.
        table_width: width of the embedding's vectors; None for that of the stream.
        group: which of several parts side by side this is; each has score biases of its own.
        vocabulary: number of token ids; None where there are none, and for a part used alone.
    """

    width: int
    depths: tuple[int, int] = (0, 1)
    layer: int | None = 0
    causal: bool = True
    memory_width: int | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    gives: Gives = Gives()
    linear_spec: LinearSpec = field(default_factory=lambda: resolve("linear", "dense")())  # type: ignore[assignment]
    norm_spec: NormSpec = field(default_factory=lambda: resolve("norm", "rmsnorm")())  # type: ignore[assignment]
    residual_spec: ResidualSpec = field(default_factory=lambda: resolve("residual", "pre")())  # type: ignore[assignment]
    position_spec: PositionSpec | None = None
    positions: _Positions | None = None
    table_width: int | None = None
    group: int = 0
    vocabulary: int | None = None

    @property
    def init(self) -> Initialise:
        """How the residual's theory wants weights to start."""
        return self.residual_spec.rule(self)

    def linear(
        self, d_in: int, out: int | tuple[int, ...], roles: str | tuple[str, ...], bias: Bias = False
    ) -> nn.Module:
        """A projection of the model's kind. A tuple `out` is one fused matrix whose slices keep their roles, and have a
        bias or not, each."""
        outs = (out,) if isinstance(out, int) else out
        names = (roles,) if isinstance(roles, str) else roles
        if isinstance(bias, tuple) and len(set(bias)) == 1:
            bias = bias[0]
        return self.linear_spec.build(d_in, outs, names, bias, self.init)

    def bank(self, count: int, d_in: int, out: int | tuple[int, ...], roles: str | tuple[str, ...]) -> nn.Module:
        """`count` projections side by side, of the model's kind, for rows that are grouped by which they take."""
        outs = (out,) if isinstance(out, int) else out
        names = (roles,) if isinstance(roles, str) else roles
        return self.linear_spec.bank(count, d_in, outs, names, self.init)

    def norm(self, width: int | None = None, before_linear: bool = False) -> nn.Module:
        """A norm of the model's kind; nothing where the linear that follows owns one."""
        if before_linear and self.linear_spec.owns_norm:
            return nn.Identity()
        return self.norm_spec.build(width or self.width)

    def inner_norm(self, width: int) -> nn.Module:
        """A norm before an output projection, where the residual asks for one (Sub-LN); nothing otherwise."""
        return self.residual_spec.inner_norm(self, width)

    def position(self, dim: int, heads: int) -> str | None:
        """Key of the position module for heads of `dim`: the stack owns it, the part asks its context by key."""
        if self.position_spec is None or self.positions is None:
            return None
        if self.position_spec.gives in ("nothing", "embedding"):
            return None
        return self.positions.add(self.position_spec, dim, heads, self.width, self.group)


def parameter_name(name: str) -> str:
    """`name` without the prefixes that wrappers add: names never carry them."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def initialise(model: nn.Module, seed: int, prefix: str = "") -> nn.Module:
    """Give every parameter its first value from a generator keyed by (seed, parameter name).

    Two models that differ in one part therefore agree bit for bit in every other parameter, on any device. A module
    that has parameters of its own says how with ``initialise(name, parameter, generator)``, and one that has buffers
    with ``initialise_buffers()``.

    Raises:
        TypeError: a module has parameters and no `initialise`.
    """
    for path, module in model.named_modules():
        if hasattr(module, "initialise_buffers"):
            module.initialise_buffers()
        for name, parameter in module.named_parameters(recurse=False):
            full = parameter_name(".".join(part for part in (prefix, path, name) if part))
            if not hasattr(module, "initialise"):
                raise TypeError(f"{type(module).__name__} has the parameter {full} and no initialise()")
            fresh = torch.empty(parameter.shape, dtype=torch.float32)
            module.initialise(name, fresh, Key(seed).fold("init", full).generator())
            with torch.no_grad():
                parameter.copy_(fresh)
    return model
