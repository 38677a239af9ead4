"""Linear: the projection type. A kind is two functions, of the input and of the weight, so that one module serves all.

Shapes: ... any leading axes, I inputs, O outputs (the sum of the slices of a fused projection), E projections of a
bank, M rows.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from torchstone.model.site import Initialise
from torchstone.ops.experts import Groups, grouped_product
from torchstone.spec import PartSpec, lazy_parts

__all__ = ["Bias", "Linear", "LinearBank", "LinearSpec", "bias_size", "whole_bias"]

__getattr__ = lazy_parts(__name__)

Bias = bool | tuple[bool, ...]
"""Whether a projection has a bias, or which of its slices have."""


class LinearSpec(PartSpec):
    """A type of projection."""

    family: ClassVar[str] = "linear"
    default_kind: ClassVar[str] = "dense"
    exact: ClassVar[bool] = True
    """Whether the product is linear in its input: absorbing one projection into another needs it."""
    owns_norm: ClassVar[bool] = False
    """Whether the projection normalises its input itself, so that no norm goes before it."""

    def input(self, x: torch.Tensor) -> torch.Tensor:
        """The input (..., I) as the product takes it."""
        return x

    def weight(self, w_OI: torch.Tensor) -> torch.Tensor:
        """The weight (O, I) of one slice as the product takes it."""
        return w_OI

    def energy(self, d_in: int, d_out: int) -> tuple[float, float, float]:
        """Multiplications and additions of floats, and additions of 8-bit whole numbers, of one product."""
        return d_in * d_out, (d_in - 1) * d_out, 0.0

    def packed_bytes(self, d_in: int, outs: tuple[int, ...]) -> int | None:
        """Bytes of a weight in the form that `export --to packed` gives it; None where the kind has none."""
        return None

    def build(self, d_in: int, outs: tuple[int, ...], roles: tuple[str, ...], bias: Bias, init: Initialise) -> Linear:
        """The module; a kind with parameters of its own builds its own. Arguments as of `Linear`."""
        return Linear(d_in, outs, roles, bias, self, init)

    def bank(
        self, count: int, d_in: int, outs: tuple[int, ...], roles: tuple[str, ...], init: Initialise
    ) -> LinearBank:
        """`count` projections side by side, for experts; arguments as of `LinearBank`."""
        return LinearBank(count, d_in, outs, roles, self, init)


def _by_slice(spec: LinearSpec, weight: torch.Tensor, slices: tuple[int, ...]) -> torch.Tensor:
    """A fused weight as the product takes it: a kind's function is of one slice."""
    if type(spec).weight is LinearSpec.weight:
        return weight
    each = weight.split(slices)
    made = [spec.weight(w_OI) for w_OI in each]
    return weight if all(new is old for new, old in zip(made, each, strict=True)) else torch.cat(made)


def bias_size(bias: Bias, outs: tuple[int, ...]) -> int:
    """Numbers in the bias of a projection with these slices; 0 where none has one."""
    each = (bias,) * len(outs) if isinstance(bias, bool) else bias
    return sum(size for size, has in zip(outs, each, strict=True) if has)


def whole_bias(bias_b: torch.Tensor | None, bias: Bias, outs: tuple[int, ...]) -> torch.Tensor | None:
    """A bias (..., b) of some slices as one of all (..., O), zero where a slice has none."""
    if bias_b is None or isinstance(bias, bool) or all(bias):
        return bias_b
    own = iter(bias_b.split([size for size, has in zip(outs, bias, strict=True) if has], -1))
    lead = bias_b.shape[:-1]
    return torch.cat([next(own) if has else bias_b.new_zeros(*lead, n) for n, has in zip(outs, bias, strict=True)], -1)


class Linear(nn.Linear):
    """``y = input(x) weight(W)^T + b`` with the two functions of a `LinearSpec`.

    An `nn.Linear`, so that tools which look for one find it.

    Args:
        d_in: I.
        outs: sizes of the slices of O; a fused projection keeps its slices' roles for initialisation, quantisation,
            sharding and Muon.
        roles: a role per slice.
        bias: whether there is one, or which slices have one.
        spec: the kind.
        init: how a slice of a given role starts.
    """

    def __init__(
        self,
        d_in: int,
        outs: tuple[int, ...],
        roles: tuple[str, ...],
        bias: Bias,
        spec: LinearSpec,
        init: Initialise,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would draw first values
        self.in_features, self.out_features = d_in, sum(outs)
        self.slices, self.roles, self.spec, self.init, self.biased = outs, roles, spec, init, bias
        self.weight = nn.Parameter(torch.empty(sum(outs), d_in))
        own = bias_size(bias, outs)
        self.register_parameter("bias", nn.Parameter(torch.empty(own)) if own else None)

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        if name == "bias":
            parameter.zero_()
        else:
            for part, role in zip(parameter.split(self.slices), self.roles, strict=True):
                self.init(part, role, generator)

    def merged(self) -> torch.Tensor:
        """The weight (O, I) of a plain projection that computes the same, where the kind is exact."""
        return _by_slice(self.spec, self.weight, self.slices)

    @property
    def bias_O(self) -> torch.Tensor | None:
        """The bias of all slices, (O,)."""
        return whole_bias(self.bias, self.biased, self.slices)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.spec.input(x), _by_slice(self.spec, self.weight, self.slices), self.bias_O)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {'+'.join(map(str, self.slices))}, {self.spec.kind}"


class LinearBank(nn.Module):
    """Projections side by side: rows that are sorted by the one that they take, times its matrix.

    The matrices are one parameter (E * O, I), one below the other, so that whatever goes by slices, as first values and
    Muon do, sees each slice of each of them.

    Args:
        count: E.
        d_in, outs, roles, spec, init: of each, as of `Linear`.
    """

    def __init__(
        self,
        count: int,
        d_in: int,
        outs: tuple[int, ...],
        roles: tuple[str, ...],
        spec: LinearSpec,
        init: Initialise,
    ) -> None:
        super().__init__()
        self.count, self.out_features, self.spec, self.init = count, sum(outs), spec, init
        self.slices, self.roles = outs * count, roles * count
        self.weight = nn.Parameter(torch.empty(count * sum(outs), d_in))

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        for part, role in zip(parameter.split(self.slices), self.roles, strict=True):
            self.init(part, role, generator)

    def forward(self, x_MI: torch.Tensor, groups: Groups) -> torch.Tensor:
        """(M, O); `groups` says which rows are whose."""
        weight_EOI = _by_slice(self.spec, self.weight, self.slices).unflatten(0, (self.count, -1))
        return grouped_product(self.spec.input(x_MI), weight_EOI, groups)

    def extra_repr(self) -> str:
        each = "+".join(map(str, self.slices[: len(self.slices) // self.count]))
        return f"{self.count} x {self.weight.shape[1]} -> {each}, {self.spec.kind}"
