"""Attention without queries and keys: values and an output projection under the probabilities of an earlier layer (Ying
et al. 2021, arXiv 2102.12702).

    out = W_O concat_j(A_j (x W_V,j)),    A_j of the layer that hands it on

The giver hands on A itself, or the queries and keys that A is made of: then this layer makes the same A again inside a
fused kernel. The first spares the projections and all work on scores and holds a T x S matrix a head; the second spares
the projections alone and holds none. Gradients flow back into the giver's queries and keys.

Shapes: B rows, T queries, S keys, D width, H heads, G value heads, K head dimension.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from torchstone.errors import TorchstoneError
from torchstone.model.attention import Attention
from torchstone.model.attention.softmax import CrossAttention, SelfAttention, SoftmaxSpec
from torchstone.model.context import Aux, Context, Handoff
from torchstone.model.site import Site
from torchstone.model.state import PartState
from torchstone.ops import attention as kernels

__all__ = ["GivenProbs", "GivenProbsSpec", "Reuse"]

Reuse = Literal["probabilities", "queries_keys"]
"""What a layer hands on, for later ones to mix their values by the same distribution."""


class GivenProbsSpec(SoftmaxSpec):
    """Values of its own, mixed by the attention distribution of an earlier layer."""

    offered: ClassVar[bool] = False
    can_give: ClassVar[frozenset[str]] = frozenset()
    takes: ClassVar[frozenset[str]] = frozenset({"probs"})
    paper: ClassVar[str] = "Ying et al. 2021, arXiv 2102.12702"

    reuse: Reuse = Field("probabilities")
    """Whether it is handed probabilities, or queries and keys."""

    def build(self, site: Site) -> Attention:
        return CrossAttention(self, site) if site.memory_width is not None else GivenProbs(self, site)


class GivenProbs(SelfAttention):
    """Decode state: the values, in a growing cache or a ring of the window, as the giver keeps its own."""

    makes_queries = makes_keys = False
    cached = ("v",)
    spec: GivenProbsSpec

    def __init__(self, spec: GivenProbsSpec, site: Site) -> None:
        super().__init__(spec, site)
        self.v = site.linear(site.width, self.G * self.K, "v", bias=spec.biased("v"))

    def forward(
        self,
        x_BTD: torch.Tensor,
        ctx: Context | None = None,
        state: PartState | None = None,
        given: Handoff | None = None,
    ) -> tuple[torch.Tensor, Handoff | None, Aux]:
        if given is None or (given.probs is None and (given.q is None or given.k is None)):
            raise TorchstoneError(
                "attention given_probs: no layer before it hands on probabilities, or queries and keys"
            )
        ctx = Context.alone(x_BTD, self.causal) if ctx is None else ctx
        v_BGTK = ctx.tap("v", self.heads(self.v(x_BTD), self.G))
        (v_BGSK,), _, low, decay = self.history(ctx, state, v=v_BGTK)
        if given.probs is not None:
            y_BHTK = kernels.weighted_values(ctx.tap("probs", given.probs).to(v_BGSK.dtype), v_BGSK)
        else:
            assert given.q is not None and given.k is not None
            # by the giver's key, so that what it dropped is dropped here
            y_BHTK = self.attend(given.q, given.k, v_BGSK, low, replace(ctx, key=given.key), decay)[0]
        return self.joined(y_BHTK, ctx), None, {}

    def flops(self, context: int) -> float:
        return super().flops(context) / (1 if self.spec.reuse == "queries_keys" else 2)
