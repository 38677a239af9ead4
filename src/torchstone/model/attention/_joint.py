"""Joint attention (LongMem, Wang et al. 2023, arXiv 2306.07174, section 2.3): softmax attention to what is near, and to
what a memory finds.

    out_h = (1 - sigmoid(b_h)) A_h + sigmoid(b_h) M_h

A is softmax attention over the sequence. M attends to the tokens of the chunks of the context's `bank` that fit each
query of each head best. Memory scores have no positions: keys lie in the bank as they were before any rotation, and are
met by queries before theirs. Where a row's memory is empty, A stands alone.

Shapes: B rows, T queries, D width, H heads, K head dimension.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from torchstone.model.attention import Attention
from torchstone.model.attention.softmax import SoftmaxAttention, SoftmaxSpec
from torchstone.model.context import Context
from torchstone.model.site import Site

__all__ = ["JointAttention", "JointSpec"]


class JointSpec(SoftmaxSpec):
    """Softmax attention beside an attention to a memory; stands in the side network of a stack."""

    kind: ClassVar[str] = "joint"
    offered: ClassVar[bool] = False
    paper: ClassVar[str] = "Wang et al. 2023, arXiv 2306.07174"

    chunks: int = Field(16, ge=1)
    """Chunks that a query takes from the memory."""

    def build(self, site: Site) -> Attention:
        return JointAttention(self, site)


class JointAttention(SoftmaxAttention):
    """Softmax attention with a gate b_h a head, which starts at 0."""

    spec: JointSpec

    def __init__(self, spec: JointSpec, site: Site) -> None:
        super().__init__(spec, site)
        self.gate_H = nn.Parameter(torch.empty(spec.heads))

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        parameter.zero_()

    def beside(self, y_BHTK: torch.Tensor, q_BHTK: torch.Tensor, ctx: Context) -> torch.Tensor:
        if ctx.bank is None:  # as an empty memory: the gate stays in the graph, with a gradient of zero
            found_BHTK, has_B = torch.zeros_like(y_BHTK), torch.zeros(1, dtype=torch.bool, device=y_BHTK.device)
        else:
            found_BHTK, has_B = ctx.bank.attend(q_BHTK, self.spec.chunks, scale=self.scale, softcap=self.spec.softcap)
        share_BH11 = torch.sigmoid(self.gate_H)[:, None, None] * has_B[:, None, None, None]
        found_BHTK = ctx.tap("remembered", found_BHTK)
        return ((1 - share_BH11) * y_BHTK + share_BH11 * found_BHTK).to(y_BHTK.dtype)
