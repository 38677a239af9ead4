"""Multiway: a feed-forward network for each kind of input, taken by what a token is and not by a router (VLMo, Bao et
al. 2021, arXiv 2111.02358, section 3.1; BEiT-3, Wang et al. 2022, arXiv 2208.10442, section 2.1).

    y = W2_m act(W1_m x + b1_m) + b2_m        m: the token's modality

Attention is shared by all of them, and so is the norm before. A token meets one network, whatever their number. Tokens
without a modality column are of modality 0. Upper layers in which all tokens meet one network, as VLMo's for pairs, are
layers with another `ffn`.

Shapes: B rows, T tokens, D width, E modalities, N = B * T, F hidden units.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.model.context import Aux, Context
from torchstone.model.feedforward import ACTIVATIONS, Activation, FeedForward, FeedForwardSpec
from torchstone.model.site import Site
from torchstone.ops.experts import Groups, collect, group, spread

__all__ = ["Multiway", "MultiwaySpec"]


class MultiwaySpec(FeedForwardSpec):
    """A network of two projections for each modality; `hidden` is one's, by default 4 x width."""

    paper: ClassVar[str] = "Bao et al. 2021, arXiv 2111.02358; Wang et al. 2022, arXiv 2208.10442"

    modalities: int = Field(2, ge=1)
    """E, kinds of input, numbered from 0."""
    activation: Activation = "gelu"
    """gelu (exact), gelu_tanh, relu, relu2 (squared relu) or silu."""
    bias: bool = False
    """Whether both projections have a bias."""

    def build(self, site: Site) -> FeedForward:
        return Multiway(self, site)


class Multiway(FeedForward):
    """(B, T, D) -> (B, T, D)."""

    def __init__(self, spec: MultiwaySpec, site: Site) -> None:
        super().__init__()
        E, D, hidden = spec.modalities, site.width, spec.hidden or 4 * site.width
        self.E, self.activation, self.dropout = E, ACTIVATIONS[spec.activation], site.dropout
        self.up = site.bank(E, D, hidden, "up")
        self.inner_norm = site.inner_norm(hidden)
        self.down = site.bank(E, hidden, D, "down")
        # vectors one after the other, no matrix: what treats matrices in a way of their own must not take them for one
        self.up_bias = nn.Parameter(torch.empty(E * hidden)) if spec.bias else None
        self.down_bias = nn.Parameter(torch.empty(E * D)) if spec.bias else None

    @property
    def inactive_parameters(self) -> int:
        """Parameters of the networks that a token does not meet."""
        own = [*self.up.parameters(), *self.down.parameters(), *self.parameters(recurse=False)]
        return sum(parameter.numel() for parameter in own) // self.E * (self.E - 1)

    def flops(self, context: float) -> float:
        """What counting takes away too much: all biases, where a token meets those of one network."""
        return 2.0 * sum(p.numel() for p in self.parameters(recurse=False)) / self.E * (self.E - 1)

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        """Biases start at 0."""
        parameter.zero_()

    def forward(self, x_BTD: torch.Tensor, ctx: Context | None = None) -> tuple[torch.Tensor, Aux]:
        """Mixed stream (B, T, D).

        Raises:
            TorchstoneError: a token has a modality that there is no network for.
        """
        ctx = Context.alone(x_BTD) if ctx is None else ctx
        x_ND = x_BTD.flatten(0, 1)
        modality_N1 = self._modality(x_BTD, ctx).reshape(-1, 1)
        groups = group(modality_N1, self.E)
        h = self._plus(self.up(spread(x_ND, groups), groups), self.up_bias, groups)
        h = ctx.drop(self.inner_norm(ctx.tap("hidden", self.activation(h))), self.dropout, "hidden")
        y = self._plus(self.down(h, groups), self.down_bias, groups)
        y_ND = collect(y, torch.ones_like(modality_N1, dtype=x_ND.dtype), groups)
        return ctx.tap("out", y_ND.view(x_BTD.shape)), {}

    def _modality(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        """(B, T)."""
        B, T, _ = x_BTD.shape
        given = ctx.q.modality
        if given is None:
            return torch.zeros(B, T, dtype=torch.int64, device=x_BTD.device)
        # elsewhere a look at the numbers would make the host wait
        if given.device.type == "cpu" and not torch.compiler.is_compiling() and given.numel():
            least, most = int(given.min()), int(given.max())
            if least < 0 or most >= self.E:
                wrong = least if least < 0 else most
                raise TorchstoneError(f"ffn multiway: no network for modality {wrong}; there are {self.E}, from 0")
        return given.expand(B, T)

    def _plus(self, y_MO: torch.Tensor, bias: torch.Tensor | None, groups: Groups) -> torch.Tensor:
        if bias is None:
            return y_MO
        return y_MO + bias.view(self.E, -1).index_select(0, groups.expert_M).to(y_MO.dtype)
