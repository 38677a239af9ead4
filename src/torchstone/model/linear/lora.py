"""LoRA: a frozen projection and a trained product of two narrow matrices beside it (Hu et al. 2021, arXiv 2106.09685,
equation 3).

Shapes: ... any leading axes, I inputs, O outputs, R rank, N adapted slices, P their outputs in all.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import nn

from torchstone.model.linear import Bias, Linear, LinearSpec
from torchstone.model.site import Initialise
from torchstone.spec import Part, part

__all__ = ["ROLES", "LoraLinear", "LoraSpec", "Targets"]

ROLES = ("q", "k", "v", "out", "gate", "up", "down")


def _known(targets: Any) -> Any:
    names = [targets] if isinstance(targets, str) else targets
    if not isinstance(names, list | tuple) or not names or not all(name in ROLES for name in names):
        raise ValueError(f"needs one or more of {', '.join(ROLES)}, got {targets!r}")
    return tuple(dict.fromkeys(names))


Targets = Annotated[tuple[str, ...], BeforeValidator(_known)]
"""Roles of projections: q, k, v, out of attention, gate, up, down of feed-forwards."""


class LoraSpec(LinearSpec):
    """A projection with a low-rank update, ``y = base(x) + alpha / rank * x A^T B^T``, for each slice of a target role.

    ``adapt: {kind: lora}`` puts it into the model of a run and trains A and B alone.
    """

    paper: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685"

    rank: int = Field(8, ge=1)
    """R, the width between A and B."""
    alpha: float = Field(16.0, gt=0)
    """The update is scaled by alpha / rank."""
    targets: Targets = ROLES
    """Roles of the projections that are adapted: q, k, v, out of attention, gate, up, down of feed-forwards."""
    base: Part[LinearSpec] = part("dense", "linear")
    """The kind of the frozen projection."""

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """An update does not change whether the product is linear."""
        return self.base.exact

    @property
    def owns_norm(self) -> bool:  # type: ignore[override]
        """As the frozen projection does."""
        return self.base.owns_norm

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def input(self, x: torch.Tensor) -> torch.Tensor:
        return self.base.input(x)

    def weight(self, w_OI: torch.Tensor) -> torch.Tensor:
        return self.base.weight(w_OI)

    def build(self, d_in: int, outs: tuple[int, ...], roles: tuple[str, ...], bias: Bias, init: Initialise) -> Linear:
        if not set(roles) & set(self.targets):
            return self.base.build(d_in, outs, roles, bias, init)
        return LoraLinear(d_in, outs, roles, bias, self, init)


class LoraLinear(Linear):
    """A projection whose slices of target roles have an update each: A of all of them stacked (N R, I), B below each
    other (P, R)."""

    spec: LoraSpec

    def __init__(
        self, d_in: int, outs: tuple[int, ...], roles: tuple[str, ...], bias: Bias, spec: LoraSpec, init: Initialise
    ) -> None:
        super().__init__(d_in, outs, roles, bias, spec, init)
        self.adapted = tuple(i for i, role in enumerate(roles) if role in spec.targets)
        self.lora_a = nn.Parameter(torch.empty(len(self.adapted) * spec.rank, d_in))
        self.lora_b = nn.Parameter(torch.empty(sum(outs[i] for i in self.adapted), spec.rank))

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        if name == "lora_b":
            parameter.zero_()  # the update starts at nothing
        elif name == "lora_a":
            bound = 1 / math.sqrt(self.in_features)
            parameter.uniform_(-bound, bound, generator=generator)
        else:
            super().initialise(name, parameter, generator)

    def slice_updates(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Number of an adapted slice -> its A (R, I) and B (O of the slice, R)."""
        a_s = self.lora_a.split(self.spec.rank)
        b_s = self.lora_b.split([self.slices[i] for i in self.adapted])
        return dict(zip(self.adapted, zip(a_s, b_s, strict=True), strict=True))

    def merged(self) -> torch.Tensor:
        pieces = list(super().merged().split(self.slices))
        for i, (a_RI, b_OR) in self.slice_updates().items():
            pieces[i] = pieces[i] + self.spec.scale * (b_OR @ a_RI)
        return torch.cat(pieces)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        h = F.linear(x, self.lora_a).split(self.spec.rank, -1)
        b_s = [b for _, b in self.slice_updates().values()]
        updates = {i: F.linear(part, b) for i, part, b in zip(self.adapted, h, b_s, strict=True)}
        if len(updates) == len(self.slices):
            update = torch.cat(list(updates.values()), -1) if len(updates) > 1 else updates[0]
            return y + self.spec.scale * update
        pieces = list(y.split(self.slices, -1))
        for i, update in updates.items():
            pieces[i] = pieces[i] + self.spec.scale * update
        return torch.cat(pieces, -1)
