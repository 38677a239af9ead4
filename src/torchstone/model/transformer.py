"""The Transformer: an embedding, an encoder and/or a decoder, a head.

One class serves encoders (`causal: false`), decoders and encoder-decoders (`encoder: {...}`). Its parts are named by
one grammar of paths, ``decoder.layers.3.attention``, for parameters, taps, state and errors.

Shapes: B rows, T tokens, S memory tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import nn

from torchstone.errors import TorchstoneError, nearest
from torchstone.model import ModelSpec
from torchstone.model.bank import Bank
from torchstone.model.context import Aux, Context, Memory, add_aux, aux_of
from torchstone.model.embedding import EmbeddingSpec
from torchstone.model.head import HeadSpec, VocabularyHead
from torchstone.model.mask import BIDIRECTIONAL, CAUSAL, Mask
from torchstone.model.site import Site
from torchstone.model.stack import LayerSpec, Stack, StackSpec
from torchstone.model.state import Slot, State
from torchstone.model.taps import Taps
from torchstone.model.tokens import Tokens
from torchstone.spec import Part, merge, part, validate

__all__ = ["Output", "Transformer", "TransformerSpec"]


_DEEPEST = 10_000
"""Layers of one side, at most: ten times the deepest Transformer that anybody has trained."""


class TransformerSpec(LayerSpec, ModelSpec):
    """The backbone: encoder, decoder or encoder-decoder from swappable parts."""

    width: int = Field(256, ge=1)
    """Width of the stream."""
    depth: int = Field(4, ge=1, le=_DEEPEST)
    """Number of layers (of the decoder, where there is an encoder too)."""
    vocabulary: int | None = Field(None, ge=1)
    """Number of token ids; None takes the tokenizer's."""
    context: int | None = Field(None, ge=1)
    """Positions that tables of positions hold; None takes the training block's, or a picture's tokens."""
    causal: bool = True
    """Whether this is a decoder; False makes it an encoder."""
    embedding: Part[EmbeddingSpec] = part("token", "embedding")
    """What stands at the input."""
    head: Part[HeadSpec] = part("lm", "head")
    """What stands at the output."""
    stack: Part[StackSpec] = part("plain", "stack")
    """What layers share."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Rate for embeddings, feed-forward hidden units and sublayer outputs."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Rate at which the last layer's sublayers are skipped per row (stochastic depth), growing linearly from 0."""
    layers: tuple[dict[str, Any], ...] = ()
    """Patches by layer: {at: [0, 2], ffn: {...}} changes parts of layers 0 and 2."""
    encoder: dict[str, Any] | None = None
    """Makes it an encoder-decoder: a patch {depth: ..., attention: {...}, layers: [...]} on the decoder's parts."""

    _plans: dict[str, tuple[LayerSpec, ...]] = PrivateAttr(default_factory=dict)
    _placed: dict[str, tuple[LayerSpec, ...]] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _legal(self) -> TransformerSpec:
        try:
            self._plans["decoder" if self.causal else "encoder"] = self._plan(self._base(), self.depth, self.layers, "")
            if self.encoder is not None:
                if not self.causal:
                    raise TorchstoneError(
                        "encoder: an encoder-decoder needs causal: true; for an encoder alone drop it"
                    )
                body = dict(self.encoder)
                depth, layers = body.pop("depth", self.depth), body.pop("layers", ())
                if not isinstance(depth, int) or isinstance(depth, bool) or not 1 <= depth <= _DEEPEST:
                    raise TorchstoneError(f"encoder.depth: needs a whole number from 1 to {_DEEPEST}, got {depth!r}")
                base = validate(LayerSpec, merge(self._base().dump(), body, LayerSpec), "encoder")
                self._plans["encoder"] = self._plan(base, depth, layers, "encoder.")
            for side, plan in self._plans.items():
                for number, layer in enumerate(plan):
                    self._check(layer, number, side)
                placed = self.stack.plan(plan, self.width, side == "decoder")
                self._placed[side] = tuple(layer.spec for layer in placed)
            fed = [layer.ffn for plan in self._placed.values() for layer in plan if layer.ffn.reads_ids]
            if fed and not self.embedding.of_tokens:
                raise TorchstoneError(
                    f"ffn {fed[0].kind}: chooses by token ids, and embedding {self.embedding.kind} has none"
                )
            if self.vocabulary is None and not self.embedding.of_tokens and self.head.over_vocabulary:
                raise TorchstoneError(
                    f"head {self.head.kind}: needs a vocabulary, and embedding {self.embedding.kind} "
                    "has none; set vocabulary"
                )
            tied = getattr(self.head, "tied", False)
            if not self.embedding.of_tokens and tied:
                raise TorchstoneError(f"head.tied: embedding {self.embedding.kind} has no matrix to tie to")
            wide = self.embedding.table_width(self.width)
            if tied and wide != self.width and not self.head.any_table:
                raise TorchstoneError(
                    f"head.tied: head {self.head.kind} multiplies vectors of width {self.width}, and those of the "
                    f"embedding's matrix have {wide}; untie it, or leave embedding.size out"
                )
        except TorchstoneError as error:
            raise ValueError(str(error)) from None
        return self

    def _base(self) -> LayerSpec:
        return LayerSpec(**{name: getattr(self, name) for name in LayerSpec.model_fields})

    def _plan(self, base: LayerSpec, depth: int, patches: Any, where: str) -> tuple[LayerSpec, ...]:
        if not isinstance(patches, list | tuple):
            raise TorchstoneError(f"{where}layers: needs a list of patches, got {patches!r:.60}")
        plan = [base] * depth
        for number, patch in enumerate(patches):
            here = f"{where}layers.{number}"
            if not isinstance(patch, Mapping) or not isinstance(patch.get("at"), list | tuple):
                raise TorchstoneError(f"{here}: needs 'at', a list of layer numbers, and the parts to change")
            body = {name: value for name, value in patch.items() if name != "at"}
            for at in patch["at"]:
                if not isinstance(at, int) or isinstance(at, bool) or not -depth <= at < depth:
                    raise TorchstoneError(f"{here}.at: no layer {at!r} among {depth} layers")
                plan[at] = validate(LayerSpec, merge(plan[at].dump(), body, LayerSpec), here)
        return tuple(plan)

    def _check(self, layer: LayerSpec, number: int, side: str) -> None:
        causal = side == "decoder"
        reason = layer.illegal(self.width)
        if misplaced := layer.attention.misplaced() or layer.block.misplaced():
            reason = misplaced
        elif layer.attention.causal_only and not causal:
            reason = f"attention {layer.attention.kind} has no bidirectional form; it needs causal: true"
        elif unfit := layer.position.unfit(self.embedding.count, self.context):
            reason = unfit
        elif layer.position.causal_only and not causal:
            reason = f"position {layer.position.kind} has no bidirectional form; it needs causal: true"
        elif layer.position.gives == "embedding" and layer.position != self._plans[side][0].position:
            reason = f"position {layer.position.kind} is added to the input and cannot differ by layer"
        elif causal and self.encoder is not None and not layer.block.takes_memory:
            reason = f"block {layer.block.kind} has no place for a cross-attention"
        elif causal and self.encoder is not None and not layer.attention.crosses:
            reason = f"attention {layer.attention.kind} cannot attend to an encoder"
        if reason:
            differs = any(layer != other for other in self._plans[side])
            raise TorchstoneError(f"layer {number}: {reason}" if differs else reason)

    @property
    def depths(self) -> tuple[int, int]:
        """Layers of the encoder and of the decoder."""
        return len(self._plans.get("encoder", ())), len(self._plans.get("decoder", ()))

    def plan(self, side: Literal["encoder", "decoder"]) -> tuple[LayerSpec, ...]:
        """Specs of the layers of one side, patches applied; empty where there is no such side."""
        return self._plans.get(side, ())

    def placed(self, side: Literal["encoder", "decoder"]) -> tuple[LayerSpec, ...]:
        """As `plan`, with the kinds that the stack puts there."""
        return self._placed.get(side, ())

    def build(self) -> Transformer:
        if self.vocabulary is None and (self.embedding.of_tokens or self.head.over_vocabulary):
            raise TorchstoneError("vocabulary: is required to build the model (a recipe takes it from its tokenizer)")
        return Transformer(self)


@dataclass(frozen=True)
class Output:
    """What a forward gives.

    Attributes:
        hidden: (B, T, D), after the final norm; (B, 1, D) when only the last was asked for.
        logits: (B, T, V) or (B, classes); None when not asked for.
        aux: sums for the objective and for metrics.
    """

    hidden: torch.Tensor
    logits: torch.Tensor | None = None
    aux: Aux = field(default_factory=dict)


class Transformer(nn.Module):
    """See `TransformerSpec`."""

    kind: ClassVar[str] = "transformer"

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.spec = spec
        context = spec.context or spec.embedding.count or 1024
        base = Site(
            width=spec.width,
            depths=spec.depths,
            layer=None,
            causal=spec.causal,
            dropout=spec.dropout,
            drop_path=spec.drop_path,
            linear_spec=spec.linear,
            norm_spec=spec.norm,
            residual_spec=spec.residual,
            table_width=spec.embedding.table_width(spec.width),
            vocabulary=spec.vocabulary if spec.embedding.of_tokens else None,
        )
        self.embedding = spec.embedding.build(base, spec.vocabulary)
        self.encoder = self.decoder = None
        if plan := spec.plan("encoder"):
            self.encoder = spec.stack.build(plan, replace(base, causal=False), context, None)
        if plan := spec.plan("decoder"):
            width = spec.width if self.encoder is not None else None
            self.decoder = spec.stack.build(plan, replace(base, causal=True), context, width)
        self.head = spec.head.build(base, spec.vocabulary)

    @property
    def main(self) -> Stack:
        """The stack whose hidden states the head sees."""
        stack = self.decoder if self.decoder is not None else self.encoder
        assert stack is not None
        return stack

    @property
    def stacks(self) -> dict[str, Stack]:
        """Stacks by name."""
        return {name: stack for name in ("encoder", "decoder") if (stack := getattr(self, name)) is not None}

    @property
    def limit(self) -> int | None:
        """Largest number of positions the model knows; None if any."""
        return self.main.limit

    def check_length(self, length: int) -> None:
        """Refuse sequences that a table of positions does not reach.

        Raises:
            TorchstoneError: `length` is beyond the limit.
        """
        for stack in self.stacks.values():
            if stack.limit is not None and length > stack.limit:
                kind = next(name for name, module in stack.positions.items() if module.limit == stack.limit)
                raise TorchstoneError(f"{length} tokens: position {kind} knows {stack.limit} positions (model.context)")

    def check_offsets(self) -> None:
        """Refuse score offsets of keys where an attention has no scores to add them to.

        Raises:
            TorchstoneError: names the layer.
        """
        for side in self.stacks:
            for number, layer in enumerate(self.spec.placed(side)):  # type: ignore[arg-type]
                if not layer.attention.offsets:
                    raise TorchstoneError(
                        f"offset: attention {layer.attention.kind} of layer {number} adds no offsets to the scores of "
                        "its keys"
                    )

    # -- decode state

    def state_spec(self) -> dict[str, tuple[Slot, ...]]:
        """Slots by path ("decoder.layers.3.attention")."""
        return {f"decoder.{path}": slots for path, slots in self.decoder.state_spec().items()} if self.decoder else {}

    def state(
        self,
        rows: int,
        extent: int,
        dtype: torch.dtype | None = None,
        static: bool = False,
        cache_bits: int | None = None,
        mask: Mask = CAUSAL,
    ) -> State:
        """Empty decode state for `rows` rows of at most `extent` tokens; the rest as of `State`.

        `mask` is the one of every forward with it: where its reach is bounded, layers that can keep rings of that many
        tokens in the place of all of them.

        Raises:
            TorchstoneError: the model is no decoder, `extent` is beyond its limit, or `cache_bits` out of range.
        """
        if self.decoder is None:
            raise TorchstoneError("an encoder has no decode state; generation needs causal: true")
        self.check_length(extent)
        weight = next(self.parameters())
        slots = self.state_spec() if mask.reach is None else self._within(mask.reach)
        return State(slots, rows, extent, dtype or weight.dtype, weight.device, static, cache_bits)

    def _within(self, reach: int) -> dict[str, tuple[Slot, ...]]:
        """Slots by path, with rings of `reach` tokens for caches that would grow."""
        found = {}
        for path, slots in self.state_spec().items():
            rings = getattr(self.get_submodule(path), "rings", False) and slots[0].growth == "growing"
            found[path] = tuple(replace(slot, growth="ring", size=reach) for slot in slots) if rings else slots
        return found

    # -- forward

    def forward(
        self,
        inputs: torch.Tensor | Tokens,
        *,
        memory: torch.Tensor | Tokens | Memory | None = None,
        embeddings: torch.Tensor | None = None,
        state: State | None = None,
        mask: Mask | None = None,
        taps: Taps | None = None,
        outputs: Literal["all", "last", "none"] = "all",
        key: torch.Tensor | None = None,
        bank: Bank | None = None,
    ) -> Output:
        """Hidden states and logits.

        Args:
            inputs: ids (B, T), or `Tokens`, or what the embedding takes (pixels).
            memory: for an encoder-decoder: the encoder's inputs, or its output from `encode`. With a state, only
                the first call needs it.
            embeddings: (B, T, E) in the place of looked-up vectors, E being their size.
            state: decode state; the inputs are then the tokens after those it holds, padding on the right.
            mask: who may see whom; the default is causal for a decoder. With a state it must be causal.
            taps: values to record or replace.
            outputs: logits of all positions, of the last valid token of each row, or none. A stack may then leave out
                what only other positions need.
            key: 0-dimensional int64 key of this forward's dropout; without one, nothing is dropped.
            bank: what layers with a memory look things up in, and put these tokens into; the state's if not given.

        Raises:
            TorchstoneError: inputs of another form, more tokens than a position knows, a mask that a part cannot
                honour, a state that is full.
        """
        tokens = self._enter(inputs, state)
        mask = mask if mask is not None else CAUSAL if self.decoder is not None else BIDIRECTIONAL
        self.check_mask(mask, decoding=state is not None)
        if tokens.offset is not None or (state is not None and state.offset_BS is not None):
            self.check_offsets()
        aux: Aux = {}
        memory_out = None
        if self.encoder is not None and self.decoder is not None:
            memory_out, aux = self._memory(memory, state, taps, key)
        q = k = tokens
        relation, slots = "same", None
        if state is not None:
            q, k, slots, relation = state.begin(tokens)
        bank = state.bank if bank is None and state is not None else bank
        ctx = Context(q, k, mask, relation, slots, self.main.positions, memory_out, taps, "", key, bank)  # type: ignore[arg-type]
        side = "decoder" if self.decoder is not None else "encoder"
        parts, last = None if state is None else state.parts, outputs == "last"
        hidden, more = self.core(inputs, ctx, side, embeddings, parts, last)
        if state is not None:
            state.end()
        aux = add_aux(aux, more)
        q = q.pick(q.newest(hidden.shape[0])) if last else q
        logits = None if outputs == "none" else ctx.tap("logits", self.head(hidden, q, self.embedding.table()))
        return Output(hidden, logits, aux)

    def core(
        self,
        inputs: Any,
        ctx: Context,
        side: str,
        embeddings: torch.Tensor | None = None,
        parts: Mapping[str, Any] | None = None,
        last: bool = False,
    ) -> tuple[torch.Tensor, Aux]:
        """Embedding and one stack in a given context: what an engine may compile as a whole."""
        stack = self.stacks[side]
        ctx = replace(ctx.inside(side), positions=stack.positions)
        x_BTD = self.embedding(inputs, ctx.q, stack.added(ctx.q.where), ctx, embeddings)
        stack.prepare(ctx)
        mine = None if parts is None else {path[len(side) + 1 :]: value for path, value in parts.items()}
        x_BTD, aux = stack(x_BTD, ctx, mine, last)
        return x_BTD, aux_of(side, aux)

    def encode(
        self,
        inputs: torch.Tensor | Tokens,
        *,
        embeddings: torch.Tensor | None = None,
        taps: Taps | None = None,
        key: torch.Tensor | None = None,
    ) -> tuple[Memory, Aux]:
        """The encoder's output, for `memory`."""
        if self.encoder is None:
            raise TorchstoneError("encode: this model is a decoder and has no encoder")
        tokens = self._enter(inputs, None)
        ctx = Context(tokens, tokens, BIDIRECTIONAL, taps=taps, key=key, positions=self.encoder.positions)
        hidden, aux = self.core(inputs, ctx, "encoder", embeddings)
        return Memory(hidden, tokens), aux

    def _enter(self, inputs: Any, state: State | None) -> Tokens:
        tokens = self.embedding.tokens(inputs)
        length, limit = tokens.index.shape[1] + (0 if state is None else state.reach), self.limit
        if limit is not None and length > limit and tokens.position is not None and state is None:
            length = int(tokens.position.max()) + 1  # several tokens at a place
        self.check_length(length)
        if tokens.valid is not None and tokens.position is None and tokens.start is None and state is None:
            # padding, left or right, has no place in the count of positions
            tokens = replace(tokens, position=(tokens.valid.long().cumsum(1) - 1).clamp(min=0))
        return tokens

    def _memory(
        self, memory: Any, state: State | None, taps: Taps | None, key: torch.Tensor | None
    ) -> tuple[Memory, Aux]:
        aux: Aux = {}
        if memory is None:
            if state is None or state.memory_tokens is None:
                raise TorchstoneError("memory: an encoder-decoder needs the encoder's inputs")
            return Memory(None, state.memory_tokens), aux
        if not isinstance(memory, Memory):
            memory, aux = self.encode(memory, taps=taps, key=key)
        if state is not None:
            state.memory_tokens = memory.tokens
        return memory, aux

    def check_mask(self, mask: Mask, decoding: bool = False) -> None:
        """Refuse masks that a layer cannot honour.

        Raises:
            TorchstoneError: with the layer and what it can.
        """
        if decoding and not mask.causal:
            raise TorchstoneError("mask: decoding with a state needs a causal mask")
        side: Literal["decoder", "encoder"] = "decoder" if self.decoder is not None else "encoder"
        if not mask.causal:
            parts = [each for layer in self.spec.placed(side) for each in (layer.attention, layer.position)]
            stuck = next((each for each in parts if each.causal_only), None)
            if stuck is not None:
                raise TorchstoneError(f"mask: {stuck.family} {stuck.kind} has no bidirectional form")
        if mask in (CAUSAL, BIDIRECTIONAL):
            return
        for number, layer in enumerate(self.spec.placed(side)):
            missing = mask.names - layer.attention.masks
            if missing:
                allowed = sorted(layer.attention.masks)
                raise TorchstoneError(
                    f"mask: attention {layer.attention.kind} of layer {number} cannot honour "
                    f"{sorted(missing)[0]!r}{nearest(sorted(missing)[0], allowed)}; it can: "
                    f"{', '.join(allowed)}"
                )

    def vocabulary_head(self) -> VocabularyHead:
        """The head, for losses over the vocabulary.

        Raises:
            TorchstoneError: the model's head gives no logits over the vocabulary.
        """
        if not isinstance(self.head, VocabularyHead):
            raise TorchstoneError(
                f"model.head: {self.spec.head.kind} gives no logits over the vocabulary; use lm or mlm"
            )
        return self.head
