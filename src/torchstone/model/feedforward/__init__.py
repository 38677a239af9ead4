"""FeedForward: mixes across channels, position by position. It may see token and modality ids through its context.

y_BTD, aux = ffn(x_BTD, ctx)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from torchstone.model.context import Aux, Context
from torchstone.model.site import Site
from torchstone.spec import PartSpec, lazy_parts

if TYPE_CHECKING:
    from torchstone.model.stack import LayerSpec

__all__ = ["ACTIVATIONS", "Activation", "FeedForward", "FeedForwardSpec"]

__getattr__ = lazy_parts(__name__)

Activation = Literal["gelu", "gelu_tanh", "relu", "relu2", "silu"]


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _relu2,
    "silu": F.silu,
}
"""gelu exact and by its tanh approximation (Hendrycks and Gimpel 2016, arXiv 1606.08415), relu, its square (So et al.
2021, arXiv 2109.08668), silu."""


class FeedForwardSpec(PartSpec):
    """A way to mix across channels."""

    family: ClassVar[str] = "ffn"
    default_kind: ClassVar[str] = "swiglu"
    divided: ClassVar[tuple[str, ...]] = ("hidden",)
    """Fields that are shared out where several of it stand side by side, each on a slice of the stream."""

    hidden: int | None = Field(None, ge=1)
    """Width inside; None is the kind's usual multiple of the stream's width."""

    @property
    def reads_ids(self) -> bool:
        """Whether it goes by token ids, which an embedding of other things has not."""
        return False

    def illegal(self, layer: LayerSpec, width: int) -> str | None:
        """Why this kind cannot stand in a layer of these parts and this width; None if it can."""
        return None

    def build(self, site: Site) -> FeedForward:
        """The module."""
        raise NotImplementedError


class FeedForward(nn.Module):
    """What a feed-forward kind builds."""

    def forward(self, x_BTD: torch.Tensor, ctx: Context | None = None) -> tuple[torch.Tensor, Aux]:
        """Mixed stream (B, T, D) and sums for the objective. Without a context: one sequence a row, no padding."""
        raise NotImplementedError

    def flops(self, context: int) -> float:
        """Multiply-adds times two per token besides the products with weights."""
        return 0.0
