"""Multiway layers (BEiT-3, Wang et al. 2022, arXiv 2208.10442, section 2.1, as TorchScale, arXiv 2211.13184, has them):
tokens of each modality have projections, norms and feed-forwards of their own, and meet in attention alone.

    q_t, k_t, v_t = W_m(norm_m(x_t))     m: the modality of token t
    y_t = W'_m attention(q, k, v)_t      over the tokens of all modalities

`ffn: multiway` in a plain stack shares all but the feed-forward, as VLMo does. A token meets as many parameters as in
one plain layer. Tokens without a modality column are of modality 0.

Projections are banks, one matrix below the other; norms stand side by side. Which row takes which is the same for all
of a layer, so the tokens are sorted once a forward and each layer hands that to its projections as it begins.

Shapes: B rows, T tokens, N = B * T, I inputs, O outputs, D width, E modalities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.model.context import Aux, Context, Handoff
from torchstone.model.linear import Bias, LinearBank, LinearSpec, bias_size, whole_bias
from torchstone.model.norm import NormSpec
from torchstone.model.site import Initialise, Site
from torchstone.model.stack import LayerPlan, LayerSpec, Stack, StackSpec
from torchstone.model.state import PartState
from torchstone.model.tokens import Tokens
from torchstone.ops.experts import Groups, collect, group, spread

__all__ = ["MultiwayLinear", "MultiwayNorm", "MultiwayStack", "MultiwayStackSpec"]

_ATTENTIONS = ("softmax", "dilated", "retention", "gated_retention")
_FFNS = ("mlp", "swiglu", "geglu", "reglu")
_BLOCKS = ("sequential", "parallel")


class MultiwayStackSpec(StackSpec):
    """Projections and norms of each modality's own, and one attention over all tokens."""

    kind: ClassVar[str] = "multiway"
    paper: ClassVar[str] = "Wang et al. 2022, arXiv 2208.10442"

    modalities: int = Field(2, ge=1)
    """E, kinds of input, numbered from 0."""

    def plan(self, layers: Sequence[LayerSpec], width: int, causal: bool) -> tuple[LayerPlan, ...]:
        for number, layer in enumerate(layers):
            parts = ((layer.attention, _ATTENTIONS), (layer.ffn, _FFNS), (layer.block, _BLOCKS))
            for part, allowed in parts:
                if part.kind not in allowed:
                    raise TorchstoneError(
                        f"layer {number}: stack multiway goes with {part.family} {', '.join(allowed)}, not {part.kind}"
                    )
            if getattr(layer.attention, "qk_norm", False):
                raise TorchstoneError(f"layer {number}: stack multiway has no norms of heads; leave qk_norm out")
            if type(layer.linear).build is not LinearSpec.build:
                raise TorchstoneError(
                    f"layer {number}: stack multiway has a bank of matrices, and linear {layer.linear.kind} more than "
                    "one matrix"
                )
        return super().plan(layers, width, causal)

    def build(self, layers: Sequence[LayerSpec], site: Site, context: int, memory_width: int | None) -> Stack:
        return MultiwayStack(self, self.plan(layers, site.width, site.causal), site, context, memory_width)


class MultiwayStack(Stack):
    """See `MultiwayStackSpec`."""

    E: int
    ways: _Ways

    def __init__(
        self,
        spec: MultiwayStackSpec,
        plans: Sequence[LayerPlan],
        site: Site,
        context: int,
        memory_width: int | None,
    ) -> None:
        self.E, self.ways = spec.modalities, _Ways()  # before the layers, which are built with them
        super().__init__(plans, site, context, memory_width)
        self.norm = plans[-1].spec.residual.final_norm(replace(self.site(plans[-1], site), layer=None))
        for layer in self.blocks:
            # inside the layer, so that it happens again where activations are recomputed, and wherever it is compiled
            layer.register_forward_pre_hook(self._begin)

    def site(self, plan: LayerPlan, site: Site) -> Site:
        usual, E, ways = super().site(plan, site), self.E, self.ways
        linear, norm = _LinearOf(usual.linear_spec, E, ways), _NormOf(usual.norm_spec, E, ways)
        return replace(usual, linear_spec=linear, norm_spec=norm)  # type: ignore[arg-type]

    def _begin(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.ways.now = arguments[1].memo["multiway"]

    def through(
        self,
        numbers: range,
        x_BTD: torch.Tensor,
        ctx: Context,
        parts: Mapping[str, PartState] | None,
        given: Handoff | None = None,
    ) -> tuple[torch.Tensor, Aux]:
        memory = None if ctx.memory is None or ctx.memory.x is None else self._sorted(ctx.memory.tokens, ctx.memory.x)
        ctx.memo["multiway"] = _Way(*self._sorted(ctx.q, x_BTD), memory and memory[1])
        return super().through(numbers, x_BTD, ctx, parts, given)

    def finish(self, x_BTD: torch.Tensor, ctx: Context, last: bool) -> torch.Tensor:
        self.ways.now = ctx.memo["multiway"]
        return super().finish(x_BTD, ctx, last)

    def _sorted(self, tokens: Tokens, x_BTD: torch.Tensor) -> tuple[torch.Tensor, Groups]:
        """The modality of each token (B, T), and the tokens sorted by it.

        Raises:
            TorchstoneError: a token has a modality that there is none of.
        """
        B, T, _ = x_BTD.shape
        given = tokens.modality
        if given is None:
            given = torch.zeros(1, 1, dtype=torch.int64, device=x_BTD.device)
        # elsewhere a look at the numbers would make the host wait
        elif given.device.type == "cpu" and not torch.compiler.is_compiling() and given.numel():
            least, most = int(given.min()), int(given.max())
            if least < 0 or most >= self.E:
                wrong = least if least < 0 else most
                raise TorchstoneError(f"stack multiway: no modality {wrong}; there are {self.E}, from 0")
        modality_BT = given.expand(B, T)
        return modality_BT, group(modality_BT.reshape(-1, 1), self.E)


# ------------------------------------------------------------------------------------------- projections and norms


@dataclass
class _Way:
    """The modality (B, T) of each token, the tokens sorted by it, and those of the memory."""

    modality: torch.Tensor
    tokens: Groups
    memory: Groups | None


class _Ways:
    """What a stack's projections and norms go by at present; not a module, and nothing of it is saved."""

    now: _Way | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Ways:
        """A copy of a model shares nothing with it; of the copy all go by this one."""
        return memo.setdefault(id(self), _Ways())

    def here(self) -> _Way:
        """Raises:
        TorchstoneError: no layer of the stack is running.
        """
        if self.now is None:
            raise TorchstoneError("stack multiway: its layers run inside the stack, which says what each token is")
        return self.now


@dataclass(frozen=True)
class _LinearOf:
    """In the place of a kind of projection: as many of it as there are modalities."""

    one: LinearSpec
    E: int
    ways: _Ways

    kind: ClassVar[str] = "multiway"
    exact: ClassVar[bool] = False

    @property
    def owns_norm(self) -> bool:
        return self.one.owns_norm

    def build(self, d_in: int, outs: tuple[int, ...], roles: tuple[str, ...], bias: Bias, init: Initialise) -> Any:
        return MultiwayLinear(self, d_in, outs, roles, bias, init)


@dataclass(frozen=True)
class _NormOf:
    """In the place of a kind of norm."""

    one: NormSpec
    E: int
    ways: _Ways

    def build(self, width: int) -> nn.Module:
        return MultiwayNorm(self, width)


class MultiwayLinear(LinearBank):
    """A projection (B, T, I) -> (B, T, O) for each modality. What makes keys and values alone is of the memory's
    tokens.

    `bias` is a vector, of one after the other.
    """

    ways: _Ways
    bias: torch.Tensor | None

    def __init__(
        self, of: _LinearOf, d_in: int, outs: tuple[int, ...], roles: tuple[str, ...], bias: Bias, init: Initialise
    ) -> None:
        super().__init__(of.E, d_in, outs, roles, of.one, init)
        self.in_features, self.ways, self.of_memory = d_in, of.ways, {*roles} <= {"k", "v"}
        own, self.biased, self.outs = bias_size(bias, outs), bias, outs
        self.register_parameter("bias", nn.Parameter(torch.empty(of.E * own)) if own else None)

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        if name == "bias":
            parameter.zero_()
        else:
            super().initialise(name, parameter, generator)

    @property
    def inactive_parameters(self) -> int:
        """Parameters of the modalities that a token is not of."""
        return sum(p.numel() for p in self.parameters()) // self.count * (self.count - 1)

    def flops(self, context: float) -> float:
        """What counting takes away too much: all biases, where a token meets those of one modality."""
        return 0.0 if self.bias is None else 2.0 * self.bias.numel() / self.count * (self.count - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        way = self.ways.here()
        groups = way.memory if self.of_memory else way.tokens
        assert groups is not None
        x_NI = x.flatten(0, 1)
        y_NO = super().forward(spread(x_NI, groups), groups)
        if self.bias is not None:
            bias_EO = whole_bias(self.bias.view(self.count, -1), self.biased, self.outs)
            assert bias_EO is not None
            y_NO = y_NO + bias_EO.index_select(0, groups.expert_M).to(y_NO.dtype)
        ones_N1 = torch.ones(x_NI.shape[0], 1, dtype=y_NO.dtype, device=x.device)
        return collect(y_NO, ones_N1, groups).view(*x.shape[:2], -1)


class MultiwayNorm(nn.ModuleList):
    """A norm (B, T, D) -> (B, T, D) for each modality."""

    ways: _Ways

    def __init__(self, of: _NormOf, width: int) -> None:
        super().__init__(of.one.build(width) for _ in range(of.E))
        self.ways = of.ways

    @property
    def inactive_parameters(self) -> int:
        """Parameters of the modalities that a token is not of."""
        return sum(p.numel() for p in self.parameters()) // len(self) * (len(self) - 1)

    def flops(self, context: float) -> float:
        """What counting takes away too much: all gains, where a token meets those of one modality."""
        return 2.0 * self.inactive_parameters

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        modality_BT1 = self.ways.here().modality[..., None]
        y = self[0](x)
        for number in range(1, len(self)):
            y = torch.where(modality_BT1 == number, self[number](x), y)
        return y
