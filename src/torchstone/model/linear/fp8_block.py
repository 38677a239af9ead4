"""FP8 training with fine-grained scales (DeepSeek-AI 2024, arXiv 2412.19437, section 3.3): all three products of a
projection in E4M3, with a scale for each 1 x 128 tile of activations and gradients and each 128 x 128 block of weights,
sums in float32.

Weights, their gradients and the optimiser's state stay as they are. As in the paper, embedding, head, routers, norms
and the scores of attention are not concerned: they are no projections of this kind. Each slice of a fused projection,
and each expert's matrix, has blocks of its own. A CPU emulates the numbers; a Hopper device multiplies in 8 bits
(`torchstone.ops.fp8`).

Shapes: ... any leading axes, I inputs, O outputs, E experts, M rows.
"""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
from pydantic import Field

from torchstone.model.linear import Bias, Linear, LinearBank, LinearSpec
from torchstone.model.linear.dense import DenseSpec
from torchstone.model.site import Initialise
from torchstone.ops.experts import Groups
from torchstone.ops.fp8 import dequantise, fp8_linear, quantise

__all__ = ["FP8Bank", "FP8BlockSpec", "FP8Linear"]


class FP8BlockSpec(LinearSpec):
    """Products of 8-bit floats with a scale for each small block, over weights in full precision that train."""

    paper: ClassVar[str] = "DeepSeek-AI 2024, arXiv 2412.19437"
    exact: ClassVar[bool] = False

    tile: int = Field(128, ge=2, le=4096)
    """Numbers that share a scale, and a square of weights' side; hardware has 128."""
    power_of_two: bool = False
    """Scales are powers of two, rounded up: they lose no bit when a tile is quantised again the other way."""

    def input(self, x: torch.Tensor) -> torch.Tensor:
        x_MI = x.flatten(0, -2)
        return dequantise(*quantise(x_MI, self.tile, 1, self.power_of_two), self.tile).view(x.shape).to(x.dtype)

    def weight(self, w_OI: torch.Tensor) -> torch.Tensor:
        made = quantise(w_OI, self.tile, self.tile, self.power_of_two)
        return dequantise(*made, self.tile, self.tile).to(w_OI.dtype)

    def build(self, d_in: int, outs: tuple[int, ...], roles: tuple[str, ...], bias: Bias, init: Initialise) -> Linear:
        if roles == ("embed",):  # embeddings stay in full precision
            return DenseSpec().build(d_in, outs, roles, bias, init)
        return FP8Linear(d_in, outs, roles, bias, self, init)

    def bank(
        self, count: int, d_in: int, outs: tuple[int, ...], roles: tuple[str, ...], init: Initialise
    ) -> LinearBank:
        return FP8Bank(count, d_in, outs, roles, self, init)


class FP8Linear(Linear):
    """A projection whose three products are of 8 bits."""

    spec: FP8BlockSpec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = fp8_linear(x, self.weight.split(self.slices), self.spec.tile, self.spec.power_of_two)
        bias_O = self.bias_O
        return y if bias_O is None else y + bias_O.to(y.dtype)


class FP8Bank(LinearBank):
    """Projections side by side, each expert's rows and matrix quantised by themselves."""

    spec: FP8BlockSpec

    def forward(self, x_MI: torch.Tensor, groups: Groups) -> torch.Tensor:
        each = len(self.slices) // self.count
        weights, ends = self.weight.split(self.slices), [0, *groups.ends_E.tolist()]
        pieces = [
            fp8_linear(x_MI[a:b], weights[e * each : (e + 1) * each], self.spec.tile, self.spec.power_of_two)
            for e, (a, b) in enumerate(itertools.pairwise(ends))
            if a < b
        ]
        pieces.append(x_MI.new_zeros(x_MI.shape[0] - ends[-1], self.out_features))  # rows that no expert takes
        return torch.cat([piece.to(pieces[0].dtype) for piece in pieces])
