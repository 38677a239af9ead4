"""The wrappers: one class for each Auto class, all of them the same Transformer.

A wrapper registers the Transformer's submodules as its own and makes a Transformer of them at every forward, so that
whatever replaces a module (an adapter, a hook, a device map) is seen, and names of parameters are those of a run.

Shapes: B rows, T columns of the caller, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutput,
)
from transformers.utils import can_return_tuple

from torchstone.errors import TorchstoneError
from torchstone.interop.hf.cache import CACHE, TorchstoneCache
from torchstone.interop.hf.columns import Columns, arrange
from torchstone.interop.hf.config import TorchstoneConfig
from torchstone.model.site import initialise
from torchstone.model.taps import Taps
from torchstone.model.transformer import Output, Transformer, TransformerSpec
from torchstone.spec import merge, validate

__all__ = [
    "TorchstoneForCausalLM",
    "TorchstoneForMaskedLM",
    "TorchstoneForSequenceClassification",
    "TorchstoneModel",
]


class _Wrapper(PreTrainedModel):
    """What the wrappers share: being a Transformer, and one forward of it."""

    config_class = TorchstoneConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _with_head = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["cache", "past_key_values"]  # type: ignore[misc]

    def __init__(self, config: TorchstoneConfig) -> None:
        super().__init__(config)
        spec = self._spec(config.model_spec)
        transformer = spec.build()
        for name, module in transformer._modules.items():
            if name != "head" or self._with_head:
                self.add_module(name, module)
        # tools that multiply with the matrix of a head themselves ask for its bias; a tied one is the embedding's
        transformer.embedding.bias = None  # type: ignore[assignment]
        self._bare = {name: value for name, value in transformer.__dict__.items() if name != "_modules"}
        self.gradient_checkpointing = False
        self._no_split_modules = sorted({type(block).__name__ for block in transformer.main.blocks})
        self.post_init()

    def _spec(self, spec: TransformerSpec) -> TransformerSpec:
        """The spec that this class builds.

        Raises:
            TorchstoneError: the model is for another class.
        """
        return spec

    @property
    def transformer(self) -> Transformer:
        """The Transformer made of this wrapper's modules as they are now."""
        made = Transformer.__new__(Transformer)
        made.__dict__.update(self._bare, _modules=self._modules)
        return made

    @property
    def base_model(self) -> TorchstoneModel:
        """This model without its head, made of the same modules."""
        made = TorchstoneModel.__new__(TorchstoneModel)
        # an instance's forward is what other tools have put around this class's
        made.__dict__.update({name: value for name, value in self.__dict__.items() if name != "forward"})
        return made

    # -- first values

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Parameters that no file gave get first values keyed by (torch's initial seed, name), as a training's do.

        Raises:
            TorchstoneError: a file gave some of the weights, and not all of those below the head.
        """
        named = dict(self.named_parameters())
        new = [name for name, parameter in named.items() if not getattr(parameter, "_is_hf_initialized", False)]
        if len(new) == len(named):
            initialise(self.transformer, torch.initial_seed())
        elif new:
            lacks = next((name for name in new if not name.startswith("head.")), None)
            if lacks is not None:
                raise TorchstoneError(f"{self.name_or_path or 'weights'}: has no tensor {lacks}")
            initialise(self.get_submodule("head"), torch.initial_seed(), "head")

    # -- embeddings

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another module of torchstone's in its place."""
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The module whose matrix gives the logits; None where there is none, or where there is more to it."""
        head = self._modules.get("head")
        if head is None or not self._bare["spec"].head.over_vocabulary:
            return None
        if (own := getattr(head, "out", None)) is not None:
            return own
        return self.get_input_embeddings() if self._bare["spec"].head.kind == "lm" else None

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """The embedding, whose size is part of the spec and stays.

        Raises:
            TorchstoneError: another size was asked for.
        """
        size = self.config.vocab_size
        wanted = size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            wanted += -wanted % pad_to_multiple_of
        if wanted != size:
            raise TorchstoneError(
                f"resize_token_embeddings: a run keeps its vocabulary of {size} ids, and {wanted} were asked for"
            )
        return self.get_input_embeddings()

    # -- recomputing

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, every_n_layers: int = 1
    ) -> None:
        if every_n_layers != 1 or getattr(gradient_checkpointing_func, "func", checkpoint) is not checkpoint:
            raise TorchstoneError(
                "gradient checkpointing: recomputes every layer and offloads nothing; drop its options"
            )
        self.gradient_checkpointing = enable
        for stack in self.transformer.stacks.values():
            stack.recompute = enable

    # -- forward

    def _run(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        output_hidden_states: bool | None,
        output_attentions: bool | None,
        cache: TorchstoneCache | None = None,
        logits: bool = False,
    ) -> tuple[Output, Columns, dict[str, Any]]:
        """The Transformer's output, in our columns; how to get back; fields of their outputs, in the caller's."""
        given = [value for value in (input_ids, inputs_embeds) if value is not None]
        if len(given) != 1:
            raise TorchstoneError(f"forward: needs input_ids or inputs_embeds, got {'both' if given else 'neither'}")
        transformer, inputs = self.transformer, given[0]
        if inputs.dim() != (2 if inputs_embeds is None else 3):
            raise TorchstoneError(
                f"forward: ids are (rows, tokens), embeddings (rows, tokens, width), not {tuple(inputs.shape)}"
            )
        rows, width, device = inputs.shape[0], inputs.shape[1], inputs.device
        if token_type_ids is not None and not getattr(transformer.spec.embedding, "types", 0):
            if bool(token_type_ids.any()):
                raise TorchstoneError("token_type_ids: this model has no token types, and some are not 0")
            token_type_ids = None
        past, state = (0, None) if cache is None else (cache.columns, cache.prepare(transformer, rows, width))
        columns = arrange(
            rows, width, device, input_ids, attention_mask, position_ids, token_type_ids, state=state, past=past
        )
        position, limit = columns.tokens.position, transformer.limit
        if position is not None and limit is not None and bool((position >= limit).any()):
            raise TorchstoneError(f"position_ids: the model knows {limit} positions, from 0")
        names = self._recorded(transformer, output_hidden_states, output_attentions)
        if "attentions" in names and columns.order_BN is not None:
            raise TorchstoneError("output_attentions: not for padded rows with a cache; pass use_cache=False")
        taps = Taps(record=[name for group in names.values() for name in group]) if names else None
        key = torch.randint(2**62, (), dtype=torch.int64).to(device) if self.training else None
        out = transformer(
            columns.tokens,
            embeddings=None if inputs_embeds is None else columns.pick(inputs_embeds),
            state=state,
            taps=taps,
            outputs="all" if logits else "none",
            key=key,
        )
        recorded: dict[str, Any] = {}
        if cache is not None:
            cache.columns += width
            recorded[CACHE] = cache
        for group, wanted in names.items():
            assert taps is not None
            missing = next((name for name in wanted if name not in taps.seen), None)
            if missing is not None:
                raise TorchstoneError(f"output_{group}: this model has no {missing}")
            back = columns.back if group == "hidden_states" else lambda x: x
            recorded[group] = tuple(back(taps.seen[name]) for name in wanted)
        return out, columns, recorded

    def _recorded(
        self, transformer: Transformer, hidden_states: bool | None, attentions: bool | None
    ) -> dict[str, list[str]]:
        """Names of the values to record: the stream before and after each layer, the last one normed; probabilities."""
        side = "decoder" if transformer.decoder is not None else "encoder"
        layers = [f"{side}.layers.{number}" for number in range(len(transformer.main.blocks))]
        names = {}
        if self.config.output_hidden_states if hidden_states is None else hidden_states:
            names["hidden_states"] = [f"{side}.embedding", *(f"{layer}.x" for layer in layers[:-1]), f"{side}.norm"]
        if self.config.output_attentions if attentions is None else attentions:
            names["attentions"] = [
                f"{layer}.{name}.probs"
                for layer, block in zip(layers, transformer.main.blocks, strict=True)
                for name in block.attentions
            ]
        return names

    def _logits(self, h_BTD: torch.Tensor, columns: Columns) -> torch.Tensor:
        """Logits (B, T, V) of hidden states over the vocabulary.

        Raises:
            TorchstoneError: an adapter is on the head's matrix, which the head multiplies with directly.
        """
        transformer = self.transformer
        if hasattr(getattr(transformer.head, "out", None), "get_base_layer"):
            raise TorchstoneError("head.out: an adapter there has no effect; leave it out of target_modules")
        return transformer.head(h_BTD, columns.tokens, transformer.embedding.table())


class TorchstoneModel(_Wrapper):
    """Hidden states, without a head."""

    _with_head = False
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^head\."]  # type: ignore[misc]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: TorchstoneCache | None = None,
        past_key_values: TorchstoneCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, D) after the final norm; arguments as of transformers' own models.

        Raises:
            TorchstoneError: see `arrange`; a cache of another kind, or for an encoder.
        """
        held = _held(cache, past_key_values, use_cache)
        out, columns, recorded = self._run(
            input_ids, attention_mask, position_ids, token_type_ids, inputs_embeds,
            output_hidden_states, output_attentions, held,
        )  # fmt: skip
        return BaseModelOutputWithPast(last_hidden_state=columns.back(out.hidden), **recorded)


class TorchstoneForCausalLM(_Wrapper, GenerationMixin):
    """A decoder with a head over the vocabulary."""

    accepts_loss_kwargs = True

    def _spec(self, spec: TransformerSpec) -> TransformerSpec:
        if not spec.head.over_vocabulary:
            raise TorchstoneError(f"head {spec.head.kind}: gives no logits over the vocabulary; AutoModel takes it")
        if not spec.causal:
            raise TorchstoneError("model.causal: false is an encoder; AutoModelForMaskedLM takes it")
        return spec

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As of transformers, but a caller's `max_length` goes before the `max_new_tokens` of the run's own
        generation_config.json."""
        given = kwargs.get("input_ids") if inputs is None else inputs
        alone = all(kwargs.get(name) is None for name in ("max_new_tokens", "generation_config"))
        if alone and given is not None and kwargs.get("max_length") is not None:
            kwargs["max_new_tokens"] = kwargs.pop("max_length") - given.shape[1]
        return super().generate(inputs, *args, **kwargs)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        kind = generation_config.cache_implementation
        if kind is not None and not kind.startswith("dynamic"):  # assisted decoding may ask for "dynamic_full"
            raise TorchstoneError(f"cache_implementation: {kind!r}; a model's parts declare its state, so leave it out")
        if model_kwargs.get(CACHE) is not None:
            model_kwargs[CACHE]._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE] = TorchstoneCache()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        cache: TorchstoneCache | None = None,
        past_key_values: TorchstoneCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), or of the columns that `logits_to_keep` names; with `labels` (B, T) the shifted loss.

        Rows may be padded on either side, with or without a cache. A cache is made only where `use_cache` asks for it.

        Raises:
            TorchstoneError: see `arrange`; a cache of another kind.
        """
        held = _held(cache, past_key_values, use_cache)
        out, columns, recorded = self._run(
            input_ids, attention_mask, position_ids, token_type_ids, inputs_embeds,
            output_hidden_states, output_attentions, held,
        )  # fmt: skip
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._logits(columns.back(out.hidden)[:, keep], columns)
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **recorded)


class TorchstoneForMaskedLM(_Wrapper):
    """An encoder with a head over the vocabulary."""

    accepts_loss_kwargs = True

    def _spec(self, spec: TransformerSpec) -> TransformerSpec:
        if not spec.head.over_vocabulary:
            raise TorchstoneError(f"head {spec.head.kind}: gives no logits over the vocabulary; AutoModel takes it")
        if spec.causal:
            raise TorchstoneError("model.causal: true is a decoder; AutoModelForCausalLM takes it")
        return spec

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits (B, T, V); with `labels` (B, T) the loss where they are not -100.

        Raises:
            TorchstoneError: see `arrange`.
        """
        out, columns, recorded = self._run(
            input_ids, attention_mask, position_ids, token_type_ids, inputs_embeds,
            output_hidden_states, output_attentions,
        )  # fmt: skip
        logits, loss = self._logits(out.hidden, columns), None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return MaskedLMOutput(loss=loss, logits=logits, **recorded)


class TorchstoneForSequenceClassification(_Wrapper):
    """One set of logits a row. A model with another head gets a new one, of ``config.num_labels`` classes."""

    accepts_loss_kwargs = True

    def _spec(self, spec: TransformerSpec) -> TransformerSpec:
        if spec.head.kind == "classification":
            return spec
        head = {"kind": "classification", "classes": self.config.num_labels, "pool": "last" if spec.causal else "first"}
        body = {name: value for name, value in spec.dump().items() if name != "kind"}
        spec = validate(TransformerSpec, merge(body, {"head": head}, TransformerSpec), "spec")
        self.config.spec = spec.dump()
        return spec

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits (B, classes); with `labels` the loss of ``config.problem_type``.

        Raises:
            TorchstoneError: see `arrange`.
        """
        out, _, recorded = self._run(
            input_ids, attention_mask, position_ids, token_type_ids, inputs_embeds,
            output_hidden_states, output_attentions, logits=True,
        )  # fmt: skip
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=out.logits, config=self.config, **kwargs)
        return SequenceClassifierOutput(loss=loss, logits=out.logits, **recorded)


def _held(cache: Any, past_key_values: Any, use_cache: bool | None) -> TorchstoneCache | None:
    """The cache under either of its names, or a new one where one is wanted."""
    held = past_key_values if cache is None else cache
    if held is None:
        return TorchstoneCache() if use_cache else None
    if not isinstance(held, TorchstoneCache):
        raise TorchstoneError(f"{CACHE}: needs a TorchstoneCache, got {type(held).__name__}")
    return held
