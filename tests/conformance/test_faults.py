"""The suite itself: parts with a planted fault, registered as anybody's parts are, must fail the check made for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import pytest
import torch
import torch.nn.functional as F

from conformance import checks
from conformance.cases import Case, axes
from conformance.test_oracles import softmax_agrees_with_its_definition
from torchstone.model.attention import Attention
from torchstone.model.attention.softmax import SoftmaxAttention, SoftmaxSpec
from torchstone.model.context import Context
from torchstone.model.mask import Lowered
from torchstone.model.norm.rmsnorm import RMSNorm, RMSNormSpec
from torchstone.model.position import Position, PositionSpec
from torchstone.model.position.learned import LearnedPosition, LearnedSpec
from torchstone.model.site import Site
from torchstone.model.state import Growing, PartState, Ring

pytestmark = pytest.mark.usefixtures("float64")


class Leaking(SoftmaxAttention):
    """The mask lets a query see one token of the future."""

    def _lowered(self, ctx: Context) -> Lowered:
        ahead = replace(ctx, q=replace(ctx.q, index=ctx.q.index + 1), relation="general", memo={})
        return super()._lowered(ahead)


class OffByOne(SoftmaxAttention):
    """Keys and values go into the slot before their own."""

    def forward(self, x_BTD: Any, ctx: Any = None, state: Any = None, given: Any = None) -> Any:
        if state is not None:
            ctx = replace(ctx, slots=(ctx.slots - 1).clamp(min=0))
        return super().forward(x_BTD, ctx, state, given)


class Stale(SoftmaxAttention):
    """The cache is read and never written after the first forward."""

    def forward(self, x_BTD: Any, ctx: Any = None, state: PartState | None = None, given: Any = None) -> Any:
        if isinstance(state, Growing) and any(tensor.any() for tensor in state.tensors.values()):
            state = Growing({name: tensor.clone() for name, tensor in state.tensors.items()})
        return super().forward(x_BTD, ctx, state, given)


class Frozen(SoftmaxAttention):
    """A parameter is cut from the graph."""

    def joined(self, *arguments: Any) -> Any:
        self.out.forward = lambda x: F.linear(x, self.out.weight.detach())
        return super().joined(*arguments)


class FrozenSlice(SoftmaxAttention):
    """One slice of a fused parameter is cut from the graph."""

    def heads(self, x_BTE: torch.Tensor, heads: int) -> torch.Tensor:
        self.turn = getattr(self, "turn", 0) + 1
        return super().heads(x_BTE.detach() if self.turn % 3 == 2 else x_BTE, heads)


class Borderless(SoftmaxAttention):
    """Documents are ignored."""

    def _lowered(self, ctx: Context) -> Lowered:
        q, k = replace(ctx.q, start=None), replace(ctx.k, start=None)
        return super()._lowered(replace(ctx, q=q, k=k, memo={}))


class PadBlind(SoftmaxAttention):
    """Padding is ignored."""

    def _lowered(self, ctx: Context) -> Lowered:
        q, k = replace(ctx.q, valid=None), replace(ctx.k, valid=None)
        return super()._lowered(replace(ctx, q=q, k=k, memo={}))


class PadKeeping(SoftmaxAttention):
    """A ring keeps padding."""

    def forward(self, x_BTD: Any, ctx: Any = None, state: PartState | None = None, given: Any = None) -> Any:
        if isinstance(state, Ring):
            ctx = replace(ctx, q=replace(ctx.q, valid=None), memo={})
        return super().forward(x_BTD, ctx, state, given)


class Wide(SoftmaxAttention):
    """The window is one token too wide, everywhere alike."""

    def __init__(self, spec: Any, site: Site) -> None:
        super().__init__(spec.model_copy(update={"window": spec.window + 1}), site)


class Crowded(RMSNorm):
    """A row's result depends on the other rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(0, keepdim=True))


class Unrestarted(LearnedPosition):
    """A table made when the module is built: lost by construction on the meta device."""

    def __init__(self, context: int, width: int) -> None:
        super().__init__(context, width, 0.02)
        self.register_buffer("scale", torch.linspace(1.0, 2.0, width))

    def embed(self, where_BT: torch.Tensor) -> torch.Tensor:
        return super().embed(where_BT) * self.scale


class Wasteful(SoftmaxAttention):
    """A parameter that nothing uses."""

    def __init__(self, spec: Any, site: Site) -> None:
        super().__init__(spec, site)
        self.spare = site.linear(site.width, 1, "up")


class Forgetful(SoftmaxAttention):
    """Dropout from torch's global generator instead of the context's key."""

    def attend(self, *arguments: Any) -> Any:
        y, *rest = super().attend(*arguments)
        return F.dropout(y, 0.1), *rest


class Overflowing(SoftmaxAttention):
    """Leaves the range of numbers."""

    def attend(self, q: Any, *arguments: Any) -> Any:
        return super().attend((q * 1e30) * 1e30, *arguments)


def faulty(module: type[Attention]) -> type[SoftmaxSpec]:
    """An external attention kind that builds `module`."""

    def build(self: SoftmaxSpec, site: Site) -> Attention:
        return module(self, site) if site.memory_width is None else SoftmaxSpec.build(self, site)

    body = {
        "__module__": __name__,
        "__qualname__": f"{module.__name__}Spec",
        "__doc__": module.__doc__,
        "__annotations__": {"kind": "ClassVar[str]", "offered": "ClassVar[bool]"},
        "kind": f"faulty_{module.__name__.lower()}",
        "offered": False,  # so that no list of kinds in this process has it
        "build": build,
    }
    return type(f"{module.__name__}Spec", (SoftmaxSpec,), body)


class CrowdedSpec(RMSNormSpec):
    """See `Crowded`."""

    kind: ClassVar[str] = "faulty_crowded"
    offered: ClassVar[bool] = False

    def build(self, width: int) -> torch.nn.Module:
        return Crowded(width, self)


class UnrestartedSpec(LearnedSpec):
    """See `Unrestarted`."""

    kind: ClassVar[str] = "faulty_table"
    offered: ClassVar[bool] = False
    gives: ClassVar[Literal["embedding"]] = "embedding"

    def build(self, dim: int, heads: int, width: int, context: int, causal: bool) -> Position:
        return Unrestarted(context, width)


class DroppedFieldSpec(PositionSpec):
    """A field that the dump loses."""

    kind: ClassVar[str] = "faulty_dump"
    offered: ClassVar[bool] = False
    far: int = 3

    def model_dump(self, **arguments: Any) -> dict[str, Any]:
        return {"kind": self.kind}

    def build(self, dim: int, heads: int, width: int, context: int, causal: bool) -> Position:
        return Position()


FAULTS: list[tuple[str, str, dict[str, Any], list[str]]] = [
    *(
        ("attention", spec.kind, {"heads": 4, **fields}, caught)
        for spec, fields, caught in [
            (faulty(Leaking), {}, ["causality"]),
            (faulty(OffByOne), {}, ["decoding", "decoding_alike", "chunks", "copies"]),
            (faulty(Stale), {}, ["decoding", "decoding_alike", "chunks", "copies"]),
            (faulty(Frozen), {}, ["gradients"]),
            (faulty(FrozenSlice), {}, ["gradients"]),
            (faulty(Borderless), {}, ["documents"]),
            (faulty(PadBlind), {}, ["padding"]),
            (faulty(PadKeeping), {"window": 5}, ["decoding", "chunks"]),
            (faulty(Wasteful), {}, ["gradients"]),
            (faulty(Forgetful), {}, ["recomputation"]),
            (faulty(Overflowing), {}, ["bfloat16"]),
        ]
    ),
    ("norm", "faulty_crowded", {}, ["batch"]),
    ("position", "faulty_table", {}, ["meta"]),
    ("position", "faulty_dump", {"far": 5}, ["round_trip"]),
]


@pytest.fixture
def planted(request: pytest.FixtureRequest) -> Iterator[tuple[Case, list[str]]]:
    family, kind, fields, caught = request.param
    axes()[family][kind] = {family: {"kind": kind, **fields}}
    yield Case.of(**{family: kind, **({"head": "lm_untied"} if family == "position" else {})}), caught
    del axes()[family][kind]


@pytest.mark.parametrize("planted", FAULTS, ids=lambda fault: fault[1], indirect=True)
def test_planted_fault_is_caught(planted: tuple[Case, list[str]]) -> None:
    case, caught = planted
    for name in caught:
        check, applies = checks.CHECKS[name]
        assert applies(case)
        with pytest.raises(AssertionError):
            check(case)


def test_window_one_too_wide_is_consistent_and_only_its_oracle_sees_it() -> None:
    spec = faulty(Wide)(heads=4, window=5)
    axes()["attention"][spec.kind] = {"attention": spec.dump()}
    try:
        case = Case.of(attention=spec.kind)
        for name in ("causality", "documents", "padding", "decoding", "decoding_alike", "chunks", "batch"):
            checks.CHECKS[name][0](case)
    finally:
        del axes()["attention"][spec.kind]
    softmax_agrees_with_its_definition(SoftmaxSpec(heads=4, window=5))
    with pytest.raises(AssertionError):
        softmax_agrees_with_its_definition(spec)
