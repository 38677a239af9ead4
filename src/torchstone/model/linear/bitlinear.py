"""BitLinear: weights of one bit or of three values, activations of 8 bits, trained from scratch (Wang et al. 2023,
arXiv 2310.11453, section 2.1; Ma et al. 2024, arXiv 2402.17764, section 2).

    x' = norm(x)                     q = round(x' / s), s = max|x'| / Q for each token, Q = 2^(bits - 1) - 1
    binary:   w = sign(W - mean W)              beta = mean |W|
    ternary:  w = clip(round(W / beta), -1, 1)  beta = mean |W|
    y = s beta (w q)

The sums w q are of whole numbers and exact in float32, so that the packed form gives the same bits. Backwards,
quantisation counts as the identity ("straight-through"): W gets the gradient that beta w would, x' that of s q.

The mean and beta are those of a slice of a fused projection, or of the matrix of one expert. With G groups of inputs
("group quantization"), norm, s, mean and beta are each group's own, as shards along the inputs need it. As in the
authors' later code, s is that of a token in training too, and inputs are quantised the same way everywhere: the first
paper's shift of inputs of non-linear functions to positive numbers is left out. Norms have no gain.

Shapes: ... any leading axes, I inputs, O outputs, G groups of inputs, n = I / G, S slices, J bytes of n weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.model.linear import Bias, Linear, LinearBank, LinearSpec, bias_size, whole_bias
from torchstone.model.linear.dense import DenseSpec
from torchstone.model.site import Initialise
from torchstone.ops import at_least_float32
from torchstone.ops.bitlinear import binary, bit_product, pack, packed_bytes, quantise, rescale, ternary
from torchstone.ops.experts import Groups, grouped_product

__all__ = ["BitBank", "BitLinear", "BitLinearSpec", "PackedBitLinear"]


class BitLinearSpec(LinearSpec):
    """Weights of one bit or three values and inputs of 8 bits, over weights in full precision that train."""

    paper: ClassVar[str] = "Wang et al. 2023, arXiv 2310.11453"
    exact: ClassVar[bool] = False

    weights: Literal["ternary", "binary"] = "ternary"
    """ternary: -1, 0 and 1 (b1.58); binary: -1 and 1 (the first paper)."""
    act_bits: Literal[4, 8] = 8
    """Bits of an input."""
    norm: Literal["rmsnorm", "layernorm", "none"] = "rmsnorm"
    """Norm of the input inside the projection, in the place of the one before it; none leaves that one where it is."""
    groups: int = Field(1, ge=1)
    """Groups of inputs that are quantised each by itself."""
    packed: bool = False
    """Weights are held in 1 or 2 bits and do not train: what `torchstone export --to packed` writes."""

    @property
    def owns_norm(self) -> bool:  # type: ignore[override]
        """Whether there is a norm inside."""
        return self.norm != "none"

    @property
    def levels(self) -> int:
        """Values that a weight can have."""
        return 3 if self.weights == "ternary" else 2

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """The input by groups (..., G, n) after its norm, in at least float32."""
        x_Gn = at_least_float32(x).unflatten(-1, (self.groups, -1))
        if self.norm == "none":
            return x_Gn
        norm = F.rms_norm if self.norm == "rmsnorm" else F.layer_norm
        return norm(x_Gn, x_Gn.shape[-1:], eps=1e-5)

    def quantised(self, w_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (O, G, n) of one slice and its beta (G,), both without a gradient."""
        rule = ternary if self.weights == "ternary" else binary
        return rule(w_OI.detach().unflatten(-1, (self.groups, -1)))

    def input(self, x: torch.Tensor) -> torch.Tensor:
        x_Gn = self.normed(x)
        q_Gn, scale_G1 = quantise(x_Gn.detach(), self.act_bits)
        return _through(x_Gn, q_Gn * scale_G1).flatten(-2).to(x.dtype)

    def weight(self, w_OI: torch.Tensor) -> torch.Tensor:
        w_OGn, beta_G = self.quantised(w_OI)
        return _through(w_OI, (w_OGn * beta_G[:, None]).flatten(-2).to(w_OI.dtype))

    def operands(
        self, x: torch.Tensor, weight_OI: torch.Tensor, slices: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Whole numbers (..., G, n) and scale (..., G) of the input, values (O, G, n) and beta (S, G) of the weight.

        `rescale` of their product has the value and the gradients of the product of `input` and `weight`.
        """
        x_Gn = self.normed(x)
        q_Gn, scale_G1 = quantise(x_Gn.detach(), self.act_bits)
        each = [self.quantised(part) for part in weight_OI.split(slices)]
        w_OGn, beta_SG = torch.cat([w for w, _ in each]), torch.stack([beta for _, beta in each])
        # a step of the latent weight is 1 / beta of the value's
        over_OG1 = _rows(beta_SG, slices)[..., None].clamp(min=torch.finfo(beta_SG.dtype).tiny)
        w_OGn = _through(weight_OI.unflatten(-1, (self.groups, -1)) / over_OG1, w_OGn)
        return _through(x_Gn / scale_G1, q_Gn), scale_G1[..., 0], w_OGn, beta_SG

    def build(self, d_in: int, outs: tuple[int, ...], roles: tuple[str, ...], bias: Bias, init: Initialise) -> Linear:
        if roles == ("embed",):  # embeddings stay in full precision
            return DenseSpec().build(d_in, outs, roles, bias, init)
        self._check(d_in)
        if self.packed:
            return PackedBitLinear(d_in, outs, bias, self)  # type: ignore[return-value]
        return BitLinear(d_in, outs, roles, bias, self, init)

    def bank(
        self, count: int, d_in: int, outs: tuple[int, ...], roles: tuple[str, ...], init: Initialise
    ) -> LinearBank:
        self._check(d_in)
        if self.packed:
            raise TorchstoneError("linear.packed: matrices of experts have no packed form yet")
        return BitBank(count, d_in, outs, roles, self, init)

    def energy(self, d_in: int, d_out: int) -> tuple[float, float, float]:
        return d_in + d_out, 0.0, (d_in - 1) * d_out  # of BitNet: floats only where scales are applied

    def packed_bytes(self, d_in: int, outs: tuple[int, ...]) -> int | None:
        return self.groups * (sum(outs) * packed_bytes(d_in // self.groups, self.levels) + 4 * len(outs))

    def _check(self, d_in: int) -> None:
        if d_in % self.groups:
            raise TorchstoneError(
                f"linear.groups: {self.groups} groups do not divide the {d_in} inputs of a projection"
            )


def _through(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value`, to the bit, with the gradient of `x`."""
    return value + (x - x.detach())


def _rows(beta_SG: torch.Tensor, slices: tuple[int, ...]) -> torch.Tensor:
    """(O, G), a row for each output."""
    return torch.cat([beta_G.expand(size, -1) for beta_G, size in zip(beta_SG, slices, strict=True)])


def _sums(
    q_Gn: torch.Tensor, w_Gn: torch.Tensor, multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Products (..., O, G), a group at a time."""
    pairs = zip(q_Gn.unbind(-2), w_Gn.unbind(-2), strict=True)
    return torch.stack([multiply(q_n, w_n) for q_n, w_n in pairs], -1)


class BitLinear(Linear):
    """A projection whose product is of whole numbers."""

    spec: BitLinearSpec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q_Gn, scale_G, w_OGn, beta_SG = self.spec.operands(x, self.weight, self.slices)
        ints_OG = _sums(q_Gn.to(x.dtype), w_OGn.to(x.dtype), F.linear)
        y = rescale(ints_OG, scale_G, _rows(beta_SG, self.slices))
        bias_O = self.bias_O
        return y if bias_O is None else y + bias_O.to(y.dtype)


class BitBank(LinearBank):
    """Projections side by side, each slice of each with a mean and a beta of its own."""

    spec: BitLinearSpec

    def forward(self, x_MI: torch.Tensor, groups: Groups) -> torch.Tensor:
        q_MGn, scale_MG, w_PGn, beta_SG = self.spec.operands(x_MI, self.weight, self.slices)
        w_EOGn = w_PGn.unflatten(0, (self.count, -1)).to(x_MI.dtype)
        ints_MOG = _sums(q_MGn.to(x_MI.dtype), w_EOGn, lambda q, w: grouped_product(q, w, groups))
        beta_EOG = _rows(beta_SG, self.slices).unflatten(0, (self.count, -1))
        return rescale(ints_MOG, scale_MG, beta_EOG[groups.expert_M.clamp(max=self.count - 1)])


class PackedBitLinear(nn.Module):
    """What a trained `BitLinear` computes, from packed weights: to the bit in float32.

    Args:
        d_in: I.
        outs: sizes of the slices of O.
        bias: whether there is one, or which slices have one.
        spec: the kind.
    """

    packed: torch.Tensor
    beta: torch.Tensor

    def __init__(self, d_in: int, outs: tuple[int, ...], bias: Bias, spec: BitLinearSpec) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, sum(outs)
        self.slices, self.spec, self.biased = outs, spec, bias
        J = packed_bytes(d_in // spec.groups, spec.levels)
        self.register_buffer("packed", torch.empty(sum(outs), spec.groups, J, dtype=torch.uint8))
        self.register_buffer("beta", torch.empty(len(outs), spec.groups, dtype=torch.float32))
        own = bias_size(bias, outs)
        self.bias = nn.Parameter(torch.empty(own)) if own else None

    @property
    def packed_parameters(self) -> int:
        """Weights that the bytes hold."""
        return self.in_features * self.out_features

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        parameter.zero_()

    def initialise_buffers(self) -> None:
        self.packed.zero_()
        self.beta.zero_()  # a product of nothing, until weights are put in

    def of(self, weight_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors `packed` and `beta` of a trained weight."""
        each = [self.spec.quantised(part.float()) for part in weight_OI.split(self.slices)]
        return {
            "packed": torch.cat([pack(w_OGn, self.spec.levels) for w_OGn, _ in each]),
            "beta": torch.stack([beta_G for _, beta_G in each]),
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            raise TorchstoneError("linear.packed: packed weights do not train; train without packed, then export")
        q_Gn, scale_G1 = quantise(self.spec.normed(x.detach()), self.spec.act_bits)
        ints_NOG = bit_product(q_Gn.flatten(0, -3), self.packed, self.spec.levels)
        ints_OG = ints_NOG.view(*x.shape[:-1], *ints_NOG.shape[1:])
        y = rescale(ints_OG, scale_G1[..., 0], _rows(self.beta, self.slices)).to(x.dtype)
        bias_O = whole_bias(self.bias, self.biased, self.slices)
        return y if bias_O is None else y + bias_O.to(y.dtype)

    def extra_repr(self) -> str:
        outs = "+".join(map(str, self.slices))
        return f"{self.in_features} -> {outs}, {self.spec.kind} ({self.spec.weights}), packed"
