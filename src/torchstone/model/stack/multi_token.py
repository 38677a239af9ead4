"""Multi-token prediction (DeepSeek-AI 2024, arXiv 2412.19437, section 2.2): modules after the layers of any other
stack, each of which predicts one token further, along the chain of those before it.

Module k = 1 .. D reads at position i what the one before it gave there, and the embedding of a token further on (eqs.
21 to 24)::

    h'_i = M_k [norm(Emb(t_{i+k})); norm(h^{k-1}_i)]        h^k = norm_out(Block_k(h'))        p^k_i = Head(h^k_i)

so that p^k_i predicts t_{i+k+1} and has seen the tokens up to t_{i+k}. Block_k is a layer like the model's last;
embedding, head and the final norm are the main model's. The order [embedding; hidden] is that of published weights; the
paper writes the other one. h^0 is what the main model gives to its head, after the final norm, as published programs
read it; the paper does not say on which side of that norm.

The forward of the model is that of the main stack alone: nothing in it knows of the modules. `predict` runs one of
them, for `objective.multi_token` and for drafting (`torchstone.generate.speculative`).

Shapes: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.model.context import Aux, Context, Handoff, aux_of
from torchstone.model.site import Site
from torchstone.model.stack import LayerPlan, LayerSpec, Stack, StackSpec
from torchstone.model.state import PartState, Slot, State
from torchstone.model.tokens import Tokens
from torchstone.spec import Part, part

if TYPE_CHECKING:
    from torchstone.model.transformer import Transformer

__all__ = ["MultiTokenStackSpec", "Predictor", "predict", "predictors_of"]


class MultiTokenStackSpec(StackSpec):
    """Layers of another stack, and modules that each predict a token further on, for training and for drafts."""

    paper: ClassVar[str] = "DeepSeek-AI 2024, arXiv 2412.19437"

    predictors: int = Field(1, ge=0, le=64)
    """D, modules: further tokens that are predicted; 0 leaves the main stack alone."""
    main: Part[StackSpec] = part("plain", "stack")
    """What the layers of the model share."""

    def plan(self, layers: Sequence[LayerSpec], width: int, causal: bool) -> tuple[LayerPlan, ...]:
        if not causal:
            raise TorchstoneError("stack multi_token: predicts tokens to come; no encoder, alone or beside a decoder")
        if isinstance(self.main, MultiTokenStackSpec):
            raise TorchstoneError("stack multi_token: main is another kind of stack; more modules are more predictors")
        return self.main.plan(layers, width, causal)

    def build(self, layers: Sequence[LayerSpec], site: Site, context: int, memory_width: int | None) -> Stack:
        stack = self.main.build(layers, site, context, memory_width)
        spec = layers[-1]
        made = []
        for k in range(self.predictors):
            at = replace(stack.site(LayerPlan(spec), site), layer=len(layers) + k, drop_path=site.drop_path)
            made.append(Predictor(spec, at))
        stack.predictors = nn.ModuleList(made)
        return stack


class Predictor(nn.Module):
    """One module: (B, T, 2 D), embeddings beside hidden states, -> (B, T, D), before the final norm."""

    def __init__(self, spec: LayerSpec, site: Site) -> None:
        super().__init__()
        self.embedding_norm, self.hidden_norm = site.norm(), site.norm()
        self.project = site.linear(2 * site.width, site.width, "up")
        self.block = spec.block.build(spec, site, None)

    def state_spec(self) -> dict[str, tuple[Slot, ...]]:
        """Slots by sublayer."""
        return self.block.state_spec()

    def forward(
        self,
        both_BTE: torch.Tensor,
        ctx: Context,
        state: Mapping[str, PartState] | None = None,
        given: Handoff | None = None,
    ) -> tuple[torch.Tensor, Handoff | None, Aux]:
        """As of a block, so that a stack runs it like one of its layers."""
        e_BTD, h_BTD = both_BTE.chunk(2, -1)
        x_BTD = self.project(torch.cat([self.embedding_norm(e_BTD), self.hidden_norm(h_BTD)], -1))
        x_BTD, _, aux = self.block(x_BTD, ctx, state)
        return x_BTD, None, aux


def predictors_of(model: nn.Module) -> nn.ModuleList | None:
    """The modules of a model of this stack, which may be none; None where its stack is another one."""
    return getattr(getattr(model, "decoder", None), "predictors", None)


def predict(
    model: Transformer,
    k: int,
    hidden_BTD: torch.Tensor,
    tokens: Tokens,
    state: State | None = None,
    key: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Aux]:
    """What module `k` (from 1) gives to the head (B, T, D), and its layer's sums.

    Args:
        model: of this stack.
        k: which module.
        hidden_BTD: h^{k-1}, what the module before, or the main model, gave to the head at these positions.
        tokens: of these positions, in order from the first, but with the ids t_{i+k}.
        state: of this module alone, with those before; the tokens are then those after.
        key: of this forward's dropout, as of the model's.
    """
    stack = model.main
    q = keys = tokens
    relation, slots = "same", None
    if state is not None:
        q, keys, slots, relation = state.begin(tokens)
    name = f"predictors.{k - 1}"
    ctx = Context(q, keys, relation=relation, slots=slots, positions=stack.positions, key=key)  # type: ignore[arg-type]
    ctx = ctx.inside("decoder").inside(name)
    layer: Predictor = stack.predictors[k - 1]  # type: ignore[index, assignment]
    # no position is added: the hidden states know theirs, and attention takes those of i
    e_BTD = model.embedding(q.ids, q, None, ctx)
    layer.block.prepare(ctx)
    parts = None if state is None else state.parts
    x_BTD, _, aux = stack.run(layer, torch.cat([e_BTD, hidden_BTD], -1), ctx, parts, None)
    if state is not None:
        state.end()
    return stack.norm(x_BTD), aux_of("decoder", aux)
