"""Residual: reads the stream before a sublayer and writes to it after, owns the norms, and owns initialisation.

    h = residual.read(x);  y = sublayer(h);  x = residual.write(x, y)

Shapes: x (B, T, D).
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from torchstone.model.context import Context
from torchstone.model.site import Initialise, Site
from torchstone.spec import PartSpec, lazy_parts

__all__ = ["Residual", "ResidualSpec", "normal", "xavier"]

__getattr__ = lazy_parts(__name__)


class ResidualSpec(PartSpec):
    """How sublayers are joined to the stream."""

    family: ClassVar[str] = "residual"
    default_kind: ClassVar[str] = "pre"
    std: float = Field(0.02, gt=0, le=10)
    """Standard deviation of initial weights."""

    def init(self, depths: tuple[int, int], side: Literal["encoder", "decoder"]) -> Initialise:
        """The rule that a weight of a given role starts by, in a stack of these depths (encoder, decoder)."""
        return normal(self.std)

    def rule(self, site: Site) -> Initialise:
        """The rule at one site, for kinds whose theory tells a cross-attention, or what stands outside layers, apart
        from the rest."""
        return self.init(site.depths, "decoder" if site.causal else "encoder")

    def inner_norm(self, site: Site, width: int) -> nn.Module:
        """What a sublayer passes its channels (..., width) through before its output projection."""
        return nn.Identity()

    def build(self, site: Site, before_linear: bool = True) -> Residual:
        """The join around one sublayer."""
        raise NotImplementedError

    def final_norm(self, site: Site) -> nn.Module:
        """What the stream passes through after the last layer."""
        raise NotImplementedError


class Residual(nn.Module):
    """The join around one sublayer. Subclasses say where the norms are."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.dropout, self.drop_path = site.dropout, site.drop_path

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """What the sublayer sees, (B, T, D)."""
        raise NotImplementedError

    def write(self, x: torch.Tensor, y: torch.Tensor, ctx: Context) -> torch.Tensor:
        """The stream after the sublayer gave `y`, (B, T, D)."""
        raise NotImplementedError

    def thin(self, y: torch.Tensor, ctx: Context) -> torch.Tensor:
        """`y` after dropout and stochastic depth (Huang et al. 2016, arXiv 1603.09382)."""
        y = ctx.drop(y, self.dropout, "dropout")
        return ctx.drop(y, self.drop_path, "drop_path", per_row=True)


def normal(std: float, outputs: float = 1.0) -> Initialise:
    """Normal with mean 0; weights that write to the stream ("out", "down") have their deviation times `outputs`."""

    def rule(weight: torch.Tensor, role: str, generator: torch.Generator) -> None:
        nn.init.normal_(weight, 0.0, std * (outputs if role in ("out", "down") else 1.0), generator=generator)

    return rule


def xavier(gain: float) -> Initialise:
    """Normal with variance ``2 / (inputs + outputs)`` of a slice (Glorot and Bengio 2010), times ``gain^2`` for all
    roles but "q", "k" and "router", which make scores."""

    def rule(weight: torch.Tensor, role: str, generator: torch.Generator) -> None:
        nn.init.xavier_normal_(weight, 1.0 if role in ("q", "k", "router") else gain, generator=generator)

    return rule


def by_depth(depths: tuple[int, int], side: str) -> float:
    """``1 / sqrt(number of sublayers)`` of the side: GPT-2's scaling of weights that write to the stream."""
    layers = depths[0] if side == "encoder" else depths[1]
    per_layer = 3 if side == "decoder" and depths[0] else 2
    return 1.0 / math.sqrt(max(1, per_layer * layers))
