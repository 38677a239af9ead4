"""HySparse's sparse layer (Gao et al. 2026, arXiv 2602.03560): one query in two branches, and gates between them.

    o = sigmoid(x W_sparse) * softmax(q K'^T) V'  +  sigmoid(x W_window) * softmax(q k^T) v

K', V' are those of an earlier full layer, at the blocks to which that layer gave the largest probabilities: it is the
oracle, so nothing selects by learning, and these keys cost this layer no cache. k, v are of this layer's own, within a
window. One list of blocks serves all heads of a group. No gradient passes through the selection.

Blocks are counted from the first token of a query's document. Up to the full layer's own scores, decoding costs the
same whatever the length: it gathers the chosen blocks. More queries than one take all keys under a mask, which is the
same result.

Shapes: B rows, T queries, S keys, D width, H heads, G key/value heads, K head dimension, N blocks, C chosen ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.attention import Attention
from torchstone.model.attention.softmax import SoftmaxAttention, SoftmaxSpec, origin
from torchstone.model.context import Aux, Context, Handoff
from torchstone.model.mask import Lowered
from torchstone.model.site import Site
from torchstone.model.state import PartState
from torchstone.ops import noise

if TYPE_CHECKING:
    from torchstone.model.stack import LayerSpec

__all__ = ["OracleSparse", "OracleSparseSpec"]


class OracleSparseSpec(SoftmaxSpec):
    """Attention to the blocks that an earlier layer found most probable, beside a window of its own."""

    offered: ClassVar[bool] = False
    consumes: ClassVar[frozenset[str]] = frozenset({"rotation", "bias"})
    can_give: ClassVar[frozenset[str]] = frozenset()
    takes: ClassVar[frozenset[str]] = frozenset({"keys_values", "block_max"})
    crosses: ClassVar[bool] = False
    causal_only: ClassVar[bool] = True
    paper: ClassVar[str] = "Gao et al. 2026, arXiv 2602.03560"

    window: int = Field(128, ge=1)
    """Tokens of the window branch, the query's own included."""
    block: int = Field(64, ge=1)
    """Keys in a block."""
    top_tokens: int = Field(1024, ge=1)
    """Keys that the sparse branch sees: `top_tokens` / `block` blocks."""
    gate: Literal["element", "head"] = "element"
    """A gate for each channel of a branch, or one for each head."""
    selection: Literal["oracle", "random"] = "oracle"
    """Whose blocks: the full layer's most probable ones, or random ones, which is a control."""

    def illegal(self, layer: LayerSpec, width: int) -> str | None:
        if self.top_tokens % self.block:
            return f"attention.top_tokens: {self.top_tokens} is no multiple of a block of {self.block} keys"
        return super().illegal(layer, width)

    def gates(self, width: int) -> int:
        """Gates of one branch."""
        return self.heads * (self.head_size(width) if self.gate == "element" else 1)

    def build(self, site: Site) -> Attention:
        return OracleSparse(self, site)


class OracleSparse(SoftmaxAttention):
    """Decode state: a ring of the window, whatever the length."""

    spec: OracleSparseSpec

    def __init__(self, spec: OracleSparseSpec, site: Site) -> None:
        super().__init__(spec, site)
        self.gate = site.linear(site.width, (spec.gates(site.width),) * 2, ("gate", "gate"))
        self.draws = Key(0).fold("attention", spec.kind, "random").value

    def prepare(self, ctx: Context) -> None:
        super().prepare(ctx)
        origin(ctx)
        self._shared(ctx)

    def _shared(self, ctx: Context) -> Lowered:
        """The mask over the full layer's keys."""
        return ctx.lowered(None, self.position if self.biased else None, flags=False)

    def forward(
        self,
        x_BTD: torch.Tensor,
        ctx: Context | None = None,
        state: PartState | None = None,
        given: Handoff | None = None,
    ) -> tuple[torch.Tensor, Handoff | None, Aux]:
        if given is None or given.k is None or given.v is None or given.block_max is None:
            raise TorchstoneError("attention oracle_sparse: no layer before it hands on keys, values and block maxima")
        ctx = Context.alone(x_BTD, self.causal) if ctx is None else ctx
        own = self.own(x_BTD, ctx, state)
        y_window = self.attend(own.q, own.k, own.v, own.low, ctx.inside("window"))[0]
        q, chosen_BGTC = own.q.to(given.k.dtype), ctx.tap("blocks", self.choose(given.block_max, ctx))
        sparse = self.gathered if q.shape[2] == 1 else self.masked
        k, v, low = sparse(given.k, given.v, chosen_BGTC, ctx)
        y_sparse = self.attend(q, k, v, low, ctx.inside("sparse"))[0]
        gates = self.gate(x_BTD).sigmoid().unflatten(-1, (2 * self.H, -1)).transpose(1, 2)
        for_sparse, for_window = gates.chunk(2, 1)  # (B, H, T, K) or (B, H, T, 1)
        for_sparse, for_window = ctx.tap("sparse_gate", for_sparse), ctx.tap("window_gate", for_window)
        return self.joined(for_sparse * y_sparse + for_window * y_window, ctx), None, {}

    def choose(self, best_BGTN: torch.Tensor, ctx: Context) -> torch.Tensor:
        """(B, G, T, C): the blocks of each query and group, best first; all of them where they are fewer."""
        block, G, N = self.spec.block, best_BGTN.shape[1], best_BGTN.shape[-1]
        begins_BT, index_BT = origin(ctx), ctx.q.index
        where_BT = index_BT if begins_BT is None else index_BT - begins_BT
        n, current_BT1 = torch.arange(N, device=best_BGTN.device), (where_BT // block)[..., None]
        eligible_BGTN = (n <= current_BT1)[:, None] | (best_BGTN > 0)
        if self.spec.selection == "oracle":
            # kernels differ in the last bits: on a coarser grid, what ties here ties there, and the earliest block wins
            score_BGTN = best_BGTN.to(torch.bfloat16)
        else:
            key = noise.constant_key(self.draws, n.device)
            of_group_G11 = noise.mix(key, torch.arange(G, device=n.device))[:, None, None]
            score_BGTN = noise.uniform(noise.mix(of_group_G11, where_BT).transpose(0, 1), N)
        score_BGTN = torch.where(eligible_BGTN, score_BGTN, -1.0)
        return score_BGTN.sort(dim=-1, descending=True, stable=True).indices[..., : self.spec.top_tokens // block]

    def gathered(
        self, k_BGSK: torch.Tensor, v_BGSK: torch.Tensor, chosen_BG1C: torch.Tensor, ctx: Context
    ) -> tuple[torch.Tensor, torch.Tensor, Lowered]:
        """The keys and values of one query's blocks, and their mask (B, H, 1, C * block)."""
        B, G, S, _ = k_BGSK.shape
        R, device = self.H // G, k_BGSK.device
        offset, begins_BT = torch.arange(self.spec.block, device=device), origin(ctx)
        index_BGC = (chosen_BG1C[:, :, 0, :, None] * self.spec.block + offset).flatten(-2)
        if begins_BT is not None:
            index_BGC = index_BGC + begins_BT[:, None]
        at_BGC = index_BGC.clamp(max=S - 1)  # what lies beyond is in the future, and masked by its index
        rows, groups = torch.arange(B, device=device)[:, None, None], torch.arange(G, device=device)[:, None]
        # each group of a row sees keys of its own: to the mask it is a row
        row_N = torch.arange(B, device=device).repeat_interleave(G)
        q = ctx.q.take(row_N, torch.zeros(B * G, 1, dtype=torch.int64, device=device))
        keys = replace(ctx.k.take(row_N, at_BGC.flatten(0, 1)), index=index_BGC.flatten(0, 1))
        matrix = self._shared(replace(ctx, q=q, k=keys, relation="general", memo={})).matrix_B1TS
        if matrix is not None:
            by_group = matrix.expand(B * G, -1, -1, -1).unflatten(0, (B, G))
            if by_group.shape[2] == 1:
                matrix = by_group.expand(-1, -1, R, -1, -1).flatten(1, 2)
            else:  # a bias has all heads for each group's keys, of which the group's own are wanted
                own = by_group.unflatten(2, (G, R)).diagonal(dim1=1, dim2=2)
                matrix = own.permute(0, 4, 1, 2, 3).flatten(1, 2)
        return k_BGSK[rows, groups, at_BGC], v_BGSK[rows, groups, at_BGC], Lowered(matrix_B1TS=matrix)

    def masked(
        self, k_BGSK: torch.Tensor, v_BGSK: torch.Tensor, chosen_BGTC: torch.Tensor, ctx: Context
    ) -> tuple[torch.Tensor, torch.Tensor, Lowered]:
        """All keys and values, and a mask that leaves each query its blocks."""
        (B, G, S, _), low, begins_BT = k_BGSK.shape, self._shared(ctx), origin(ctx)
        T, block, device = chosen_BGTC.shape[2], self.spec.block, k_BGSK.device
        has_BGTN = torch.zeros(B, G, T, -(-S // block), dtype=torch.bool, device=device).scatter(-1, chosen_BGTC, True)

        def only(allowed: torch.Tensor | None, a: int, b: int, first: int, last: int) -> torch.Tensor:
            """What queries a..b may see of keys first..last, less what is in no block of theirs: (B, H, b - a, ...)."""
            key_BTS = torch.arange(first, last, device=device).expand(1, b - a, -1)
            if begins_BT is not None:
                key_BTS = key_BTS - begins_BT[:, a:b, None]
            of_block = (key_BTS.clamp(min=0) // block)[:, None].expand(B, G, -1, -1)
            chosen = has_BGTN[:, :, a:b].gather(-1, of_block) & (key_BTS >= 0)[:, None]
            chosen = chosen.repeat_interleave(self.H // G, 1)
            if allowed is None or allowed.dtype == torch.bool:
                return chosen if allowed is None else chosen & allowed
            return torch.where(chosen, allowed, float("-inf"))

        if (blocks := low.mask_of) is not None:

            def mask_of(a: int, b: int) -> tuple[int, int, torch.Tensor | None]:
                first, last, allowed = blocks(a, b)
                return first, last, only(allowed, a, b, first, last)

            return k_BGSK, v_BGSK, Lowered(mask_of=mask_of)
        return k_BGSK, v_BGSK, Lowered(matrix_B1TS=only(low.matrix_B1TS, 0, T, 0, S))

    def flops(self, context: int) -> float:
        return super().flops(context) + 4.0 * self.H * self.K * min(context, self.spec.top_tokens)
