"""Random-weight models built by `transformers` load into ours and agree: hidden states layer by layer, logits, greedy
tokens; with padding left and right and rows of several lengths; and go back exactly."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from torchstone.interop.layout import Layout, Model, find_layout, load_state
from torchstone.model.taps import Taps
from torchstone.model.tokens import Tokens
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.spec import merge, validate

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
"""Largest difference over largest value, in float32. Ten times less than what is promised: a wrong eps shows."""
PAD = {"roberta": 1, "xlm_roberta": 1}
"""Id of padding, where it is not 0."""
LENGTHS = (9, 4, 13, 1)
LAYERS = {
    "llama": "model.layers",
    "mistral": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
    "deepseek_v2": "model.layers",
    "deepseek_v3": "model.layers",
    "mixtral": "model.layers",
    "bitnet": "model.layers",
    "gpt2": "transformer.h",
    "bert": "bert.encoder.layer",
    "electra": "electra.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "xlm_roberta": "roberta.encoder.layer",
    "t5": "decoder.block",
    "mt5": "decoder.block",
}
"""Where theirs keeps the layers under the head."""
ENCODERS = ("bert", "electra", "roberta", "xlm_roberta")
ENCODER_DECODERS = ("t5", "mt5")
EMBEDDINGS = ("embeddings", "embed_tokens", "wte", "wpe", "shared")

LLAMA = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-5,
}
LONG = {**LLAMA, "head_dim": 32, "max_position_embeddings": 256}
QWEN3 = {**LLAMA, "num_hidden_layers": 4, "head_dim": 14, "rms_norm_eps": 1e-6}
DEEPSEEK = {
    **{name: value for name, value in LLAMA.items() if name != "num_key_value_heads"},
    "first_k_dense_replace": 3,
    "kv_lora_rank": 20,
    "q_lora_rank": 14,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
}
EXPERTS = {
    **DEEPSEEK,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 22,
    "n_group": 4,
    "topk_group": 2,
}
V3 = {**EXPERTS, "num_key_value_heads": 4}
GPT2 = {"vocab_size": 53, "n_positions": 40, "n_embd": 36, "n_layer": 3, "n_head": 3}
BERT = {
    "vocab_size": 67,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 40,
}
ELECTRA = {**BERT, "embedding_size": 10}
MINILM = {**BERT, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 2}
T5 = {
    "vocab_size": 59,
    "d_model": 36,
    "d_kv": 7,
    "d_ff": 50,
    # generate of transformers 5.24 makes a cache for as many layers as the encoder has: the decoder must not have more
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 5,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
}


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


def _yarn(**values: Any) -> dict[str, Any]:
    """A base so low that the ramp covers several of the few channels."""
    return _rope("yarn", factor=4.0, original_max_position_embeddings=64, **{"rope_theta": 100.0, **values})


@dataclass(frozen=True)
class Case:
    """A model of theirs: its class and what its config says. `own_head`: give the head a matrix of its own after."""

    name: str
    cls: str
    config: dict[str, Any]
    own_head: bool = False
    model_type: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_type", self.name.partition("-")[0])

    @property
    def pad(self) -> int:
        return PAD.get(self.model_type, 0)


CASES = [
    Case("llama-grouped", "LlamaForCausalLM", LLAMA),
    Case("llama-tied", "LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    Case("llama-multi_query-biases", "LlamaForCausalLM", {**LLAMA, "num_key_value_heads": 1, "attention_bias": True,
                                                         "mlp_bias": True, "head_dim": 6, "hidden_act": "gelu"}),
    Case("llama-yarn", "LlamaForCausalLM", LONG | _yarn()),
    Case("llama-yarn_as_deepseek_has_it", "LlamaForCausalLM",
         LONG | _yarn(beta_fast=8.0, beta_slow=0.5, mscale=0.7, mscale_all_dim=1.2, truncate=False)),
    Case("llama-yarn_with_attention_factor", "LlamaForCausalLM", LONG | _yarn(attention_factor=1.3)),
    Case("llama-linear", "LlamaForCausalLM", LLAMA | _rope("linear", factor=3.0)),
    Case("llama-llama3", "LlamaForCausalLM",
         {**LLAMA, "head_dim": 16} | _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                           original_max_position_embeddings=16, rope_theta=500.0)),
    Case("qwen3-wide_heads", "Qwen3ForCausalLM", QWEN3),
    Case("qwen3-tied-biases", "Qwen3ForCausalLM", {**QWEN3, "tie_word_embeddings": True, "attention_bias": True}),
    Case("qwen3-some_windows", "Qwen3ForCausalLM",
         {**QWEN3, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    Case("qwen3-all_windows", "Qwen3ForCausalLM",
         {**QWEN3, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}),
    Case("qwen2-grouped", "Qwen2ForCausalLM", LLAMA),
    Case("qwen2-tied-yarn", "Qwen2ForCausalLM",
         {**LLAMA, "hidden_size": 128, "tie_word_embeddings": True, "max_position_embeddings": 256} | _yarn()),
    Case("qwen2-some_windows", "Qwen2ForCausalLM",
         {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    Case("qwen2-alternating_windows", "Qwen2ForCausalLM",
         {**LLAMA, "use_sliding_window": True, "sliding_window": 4,
          "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    Case("qwen2-all_windows", "Qwen2ForCausalLM",
         {**LLAMA, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}),
    Case("mistral-window", "MistralForCausalLM", {**LLAMA, "sliding_window": 5}),
    Case("mistral-no_window-tied-wide_heads", "MistralForCausalLM",
         {**LLAMA, "sliding_window": None, "tie_word_embeddings": True, "head_dim": 14}),
    Case("mistral-window-yarn", "MistralForCausalLM", {**LONG, "sliding_window": 6} | _yarn()),
    Case("deepseek_v2-query_latent", "DeepseekV2ForCausalLM", DEEPSEEK),
    Case("deepseek_v2-plain_queries-tied-gelu", "DeepseekV2ForCausalLM",
         {**DEEPSEEK, "q_lora_rank": None, "tie_word_embeddings": True, "hidden_act": "gelu", "v_head_dim": 20}),
    Case("deepseek_v2-yarn", "DeepseekV2ForCausalLM",
         {**DEEPSEEK, "qk_rope_head_dim": 32, "max_position_embeddings": 256}
         | _yarn(mscale=0.707, mscale_all_dim=0.707)),
    Case("deepseek_v2-yarn_with_two_temperatures", "DeepseekV2ForCausalLM",
         {**DEEPSEEK, "q_lora_rank": None, "qk_rope_head_dim": 32, "max_position_embeddings": 256}
         | _yarn(mscale=1.3, mscale_all_dim=0.5)),
    Case("deepseek_v2-yarn_plain", "DeepseekV2ForCausalLM",
         {**DEEPSEEK, "qk_rope_head_dim": 32, "max_position_embeddings": 256} | _yarn()),
    Case("deepseek_v2-experts", "DeepseekV2ForCausalLM",
         {**EXPERTS, "routed_scaling_factor": 1.7, "topk_method": "group_limited_greedy"}),
    Case("deepseek_v2-experts_everywhere-greedy-gelu", "DeepseekV2ForCausalLM",
         {**EXPERTS, "first_k_dense_replace": 0, "n_shared_experts": 1, "hidden_act": "gelu", "q_lora_rank": None}),
    Case("deepseek_v3-experts", "DeepseekV3ForCausalLM", V3),
    Case("deepseek_v3-experts-plain_gates-halves-yarn", "DeepseekV3ForCausalLM",
         {**V3, "norm_topk_prob": False, "rope_interleave": False, "q_lora_rank": None, "qk_rope_head_dim": 32,
          "max_position_embeddings": 256} | _yarn(mscale=1.0, mscale_all_dim=1.0)),
    Case("deepseek_v3-dense", "DeepseekV3ForCausalLM", {**V3, "first_k_dense_replace": 3}),
    Case("mixtral-experts", "MixtralForCausalLM", {**LLAMA, "num_local_experts": 5, "num_experts_per_tok": 2}),
    Case("mixtral-window-wide_heads-tied", "MixtralForCausalLM",
         {**LLAMA, "sliding_window": 5, "head_dim": 14, "tie_word_embeddings": True, "num_experts_per_tok": 3}),
    Case("bitnet-not_quantised", "BitNetForCausalLM", LLAMA),
    Case("bitnet-not_quantised-biases-tied-gelu", "BitNetForCausalLM",
         {**LLAMA, "attention_bias": True, "hidden_act": "gelu", "tie_word_embeddings": True}),
    Case("llama-gate_with_relu", "LlamaForCausalLM", {**LLAMA, "hidden_act": "relu"}),
    Case("gpt2-tied", "GPT2LMHeadModel", GPT2),
    Case("gpt2-untied-unscaled", "GPT2LMHeadModel",
         {**GPT2, "tie_word_embeddings": False, "n_inner": 41, "scale_attn_weights": False,
          "activation_function": "relu", "layer_norm_epsilon": 1e-3}),
    Case("bert-masked_lm", "BertForMaskedLM", BERT),
    Case("bert-masked_lm-untied", "BertForMaskedLM",
         {**BERT, "tie_word_embeddings": False, "type_vocab_size": 3, "hidden_act": "gelu_new"}),
    Case("bert-classification", "BertForSequenceClassification", {**BERT, "num_labels": 5}),
    Case("bert-minilm", "BertForMaskedLM", MINILM),
    Case("roberta-masked_lm", "RobertaForMaskedLM", {**BERT, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    Case("roberta-masked_lm-untied", "RobertaForMaskedLM",
         {**BERT, "tie_word_embeddings": False, "hidden_act": "gelu_new"}),
    Case("roberta-classification", "RobertaForSequenceClassification", {**BERT, "type_vocab_size": 1, "num_labels": 3}),
    Case("xlm_roberta-masked_lm", "XLMRobertaForMaskedLM", {**BERT, "type_vocab_size": 1}),
    Case("xlm_roberta-classification", "XLMRobertaForSequenceClassification", BERT),
    Case("electra-discriminator", "ElectraForPreTraining", ELECTRA),
    Case("electra-discriminator-as_wide-relu", "ElectraForPreTraining",
         {**BERT, "embedding_size": 36, "hidden_act": "relu"}),
    Case("electra-generator", "ElectraForMaskedLM", {**ELECTRA, "hidden_act": "gelu_new"}),
    Case("electra-generator-wider-untied", "ElectraForMaskedLM",
         {**BERT, "embedding_size": 50, "tie_word_embeddings": False, "type_vocab_size": 3}),
    Case("electra-classification", "ElectraForSequenceClassification", {**ELECTRA, "num_labels": 4}),
    Case("t5-relu-tied", "T5ForConditionalGeneration", T5),
    Case("t5-gated_gelu-untied", "T5ForConditionalGeneration",
         {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, own_head=True),
    Case("t5-gated_silu-tied-unscaled", "T5ForConditionalGeneration",
         {**T5, "feed_forward_proj": "gated-silu", "tie_word_embeddings": False}),
    Case("t5-gated_relu-tied", "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-relu"}),
    Case("mt5-untied", "MT5ForConditionalGeneration", T5, own_head=True),
    Case("mt5-gated_silu-tied", "MT5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-silu"}),
]  # fmt: skip
DECODERS = [case for case in CASES if case.model_type not in ENCODERS + ENCODER_DECODERS]


@dataclass
class Pair:
    """The same model, theirs and ours; `state` is theirs as files have it."""

    case: Case
    layout: Layout
    config: dict[str, Any]
    theirs: Any
    spec: TransformerSpec
    ours: Transformer
    state: dict[str, torch.Tensor]


_MADE: dict[str, Pair] = {}


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Pair:
    case: Case = request.param
    if case.name not in _MADE:
        _MADE[case.name] = _pair(case)
    return _MADE[case.name]


def _pair(case: Case) -> Pair:
    cls = getattr(transformers, case.cls)
    # a copy: transformers writes into the dictionaries that it is given
    config = cls.config_class(**copy.deepcopy(case.config), attn_implementation="eager", bos_token_id=None,
                              eos_token_id=None, pad_token_id=case.pad)  # fmt: skip
    theirs = cls(config).eval()
    if case.own_head:
        theirs.lm_head.weight = nn.Parameter(torch.empty_like(theirs.lm_head.weight))
    _randomise(theirs)
    if case.model_type in PAD:  # rows of their table that stand for no position
        with torch.no_grad():
            theirs.roberta.embeddings.position_embeddings.weight[: case.pad + 1] = 0
    values = {**json.loads(config.to_json_string()), "architectures": [case.cls]}
    layout = find_layout(case.model_type)
    state = _published(theirs)
    spec = validate(TransformerSpec, layout.to_spec(values, {name: tensor.shape for name, tensor in state.items()}))
    with torch.device("meta"):
        ours = spec.build()
    load_state(ours, layout.to_ours(state, spec))
    return Pair(case, layout, values, theirs, spec, ours.eval(), state)


def _published(model: Any) -> dict[str, torch.Tensor]:
    """Tensors as its files have them: transformers 5 keeps the experts of a layer together, and files each alone."""
    if not any(".experts." in name for name in model.state_dict()):
        return model.state_dict()
    model.config._experts_implementation = "eager"  # a loop over experts
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def _randomise(model: nn.Module) -> None:
    """Every parameter away from the zeros and ones that models start with, and heads sure of what they say."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.3 * noise + (1.0 if name.endswith("weight") else 0.0))
            else:
                # small embeddings, or a tied head says again what it was told
                parameter.copy_(noise * (0.1 if name.rpartition(".")[0].endswith(EMBEDDINGS) else 0.2))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))


def cases(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("pair", cases, ids=lambda case: case.name, indirect=True)


def padded(pair: Pair, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (B, T) and valid (B, T): rows of `LENGTHS`, padded on `side`; the rows are the same for both sides."""
    T, vocabulary = max(LENGTHS), pair.spec.vocabulary or 0
    ids, valid = torch.full((len(LENGTHS), T), pair.case.pad), torch.zeros(len(LENGTHS), T, dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        at = slice(T - length, T) if side == "left" else slice(0, length)
        generator = torch.Generator().manual_seed(row)
        ids[row, at] = torch.randint(pair.case.pad + 1, vocabulary, (length,), generator=generator)
        valid[row, at] = True
    return ids, valid


def their_positions(valid: torch.Tensor) -> torch.Tensor:
    return (valid.long().cumsum(1) - 1).clamp(min=0)


def difference(a: torch.Tensor, b: torch.Tensor, valid: torch.Tensor | None = None) -> float:
    """Largest difference over the largest value, on valid positions."""
    if valid is not None:
        a, b = a[valid], b[valid]
    assert a.shape == b.shape and torch.isfinite(a).all() and torch.isfinite(b).all()
    return ((a - b).abs().max() / b.abs().max()).item()


def same_layers(
    taps: Taps, side: str, hidden: tuple[torch.Tensor, ...], valid: torch.Tensor
) -> Iterator[tuple[str, float]]:
    """Theirs gives the embedding, then the stream after every layer but the last, then the last through the norm."""
    depth = len(hidden) - 1
    names = [f"{side}.embedding", *(f"{side}.layers.{i}.x" for i in range(depth - 1)), f"{side}.norm"]
    for name, theirs in zip(names, hidden, strict=True):
        yield name, difference(taps.seen[name], theirs, valid)


@pytest.mark.parametrize("side", ["left", "right"])
@cases(CASES)
@torch.no_grad()
def test_hidden_states_after_every_layer_and_logits_agree(pair: Pair, side: str) -> None:
    ids, valid = padded(pair, side)
    taps = Taps(record=["*.embedding", "*.layers.*.x", "*.norm"])
    last: list[torch.Tensor] = []
    hook = pair.theirs.get_submodule(LAYERS[pair.case.model_type])[-1].register_forward_hook(
        lambda _m, _i, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    arguments: dict[str, Any] = {"attention_mask": valid.long(), "output_hidden_states": True}
    if pair.case.model_type in ENCODER_DECODERS:
        decoded, decoded_valid = padded(pair, "left" if side == "right" else "right")
        decoded, decoded_valid = decoded.flip(0), decoded_valid.flip(0)
        theirs = pair.theirs(ids, **arguments, decoder_input_ids=decoded, decoder_attention_mask=decoded_valid.long())
        out = pair.ours(Tokens.of(decoded, valid=decoded_valid), memory=Tokens.of(ids, valid=valid), taps=taps)
        found = dict(same_layers(taps, "encoder", theirs.encoder_hidden_states, valid))
        found |= dict(same_layers(taps, "decoder", theirs.decoder_hidden_states, decoded_valid))
        valid, stream = decoded_valid, "decoder"
    else:
        segment = None
        if pair.case.model_type in ENCODERS:
            segment = torch.arange(ids.shape[1]).expand_as(ids) % pair.config["type_vocab_size"]
            arguments["token_type_ids"] = segment
        if pair.case.model_type not in PAD:  # those count no padding by themselves
            arguments["position_ids"] = their_positions(valid)
        theirs = pair.theirs(ids, **arguments)
        out = pair.ours(Tokens.of(ids, valid=valid, segment=segment), taps=taps)
        stream = "encoder" if segment is not None else "decoder"
        found = dict(same_layers(taps, stream, theirs.hidden_states, valid))
    hook.remove()
    depth = len(pair.ours.stacks[stream].layers)
    found["last layer"] = difference(taps.seen[f"{stream}.layers.{depth - 1}.x"], last[0], valid)
    if pair.case.cls.endswith("ForSequenceClassification") and side == "left":
        # theirs pools the first column, padding or not; each row alone has none
        rows = [
            pair.theirs(ids[row][ok][None], token_type_ids=arguments["token_type_ids"][row][ok][None]).logits
            for row, ok in enumerate(valid)
        ]
        found["logits"] = difference(out.logits, torch.cat(rows))
    else:
        everywhere = None if out.logits.dim() == 2 else valid
        wanted = theirs.logits.unsqueeze(-1) if pair.case.cls == "ElectraForPreTraining" else theirs.logits
        found["logits"] = difference(out.logits, wanted, everywhere)
    assert max(found.values()) < TOLERANCE, found


@cases(DECODERS)
@torch.no_grad()
def test_greedy_decoding_with_a_cache_equals_generate(pair: Pair) -> None:
    steps = 12
    left, left_valid = padded(pair, "left")
    theirs = pair.theirs.generate(left, attention_mask=left_valid.long(), generation_config=_greedy(steps))
    right, right_valid = padded(pair, "right")
    state = pair.ours.state(len(LENGTHS), max(LENGTHS) + steps)
    assert torch.equal(
        _decode(pair.ours, Tokens.of(right, valid=right_valid), steps, state), theirs[:, left.shape[1] :]
    )


@cases([case for case in CASES if case.model_type in ENCODER_DECODERS])
@torch.no_grad()
def test_greedy_decoding_of_an_encoder_decoder_equals_generate(pair: Pair) -> None:
    steps = 14
    ids, valid = padded(pair, "right")
    theirs = pair.theirs.generate(ids, attention_mask=valid.long(), generation_config=_greedy(steps))
    start = torch.full((len(LENGTHS), 1), pair.case.pad)
    state = pair.ours.state(len(LENGTHS), steps + 1)
    ours = _decode(pair.ours, Tokens.of(start), steps, state, memory=Tokens.of(ids, valid=valid))
    assert torch.equal(ours, theirs[:, 1:])


def _greedy(steps: int) -> Any:
    return transformers.GenerationConfig(
        max_new_tokens=steps, do_sample=False, pad_token_id=0, eos_token_id=None, decoder_start_token_id=0
    )


def _decode(model: Transformer, tokens: Tokens, steps: int, state: Any, memory: Tokens | None = None) -> torch.Tensor:
    """Greedy continuations (B, steps)."""
    chosen = []
    for _ in range(steps):
        out = model(tokens, state=state, outputs="last", memory=memory)
        assert out.logits is not None
        chosen.append(out.logits[:, -1].argmax(-1))
        tokens, memory = Tokens.of(chosen[-1][:, None]), None
    assert len({tuple(column.tolist()) for column in chosen}) > 2, "the model repeats itself: the test would see little"
    return torch.stack(chosen, 1)


@cases(CASES)
def test_there_and_back_is_exact(pair: Pair) -> None:
    ours = pair.ours.state_dict()
    theirs = pair.layout.to_theirs(ours, pair.spec)
    for name, tensor in theirs.items():
        # untied, theirs keeps a second bias that it never uses
        unused = name in ("cls.predictions.bias", "lm_head.bias")
        assert tensor.is_contiguous() and (unused or torch.equal(tensor, pair.state[name])), name
    again = pair.layout.to_ours(theirs, pair.spec)
    assert again.keys() == ours.keys()
    for name, tensor in again.items():
        assert torch.equal(tensor, ours[name]), name
    config = pair.layout.to_config(pair.spec)
    assert config["architectures"] == [pair.case.cls]
    assert pair.layout.to_config(validate(TransformerSpec, pair.layout.to_spec(config))) == config


@cases(CASES)
@torch.no_grad()
def test_what_is_written_reloads_in_transformers_with_equal_logits(
    pair: Pair, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    written = pair.layout.to_theirs(pair.ours.state_dict(), pair.spec)
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(pair.layout.to_config(pair.spec)))
    capfd.readouterr()
    again, report = getattr(transformers, pair.case.cls).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    said = capfd.readouterr()
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    if not pair.case.own_head:  # theirs complains of every published T5 1.1, for it has no config for one
        assert not [line for line in (said.out + said.err).splitlines() if line.startswith("[transformers]")], said
    again.config._experts_implementation = "eager"
    ids, valid = padded(pair, "right")
    arguments: dict[str, Any] = {"attention_mask": valid.long()}
    if pair.case.model_type in ENCODER_DECODERS:
        arguments["decoder_input_ids"] = ids.flip(0)
    assert torch.equal(again.eval()(ids, **arguments).logits, pair.theirs(ids, **arguments).logits)


FAULTS = [
    ("llama-grouped", {"norm": {"eps": 1e-5}}),
    ("llama-grouped", {"position": {"interleaved": True}}),
    ("llama-grouped", {"position": {"base": 9000.0}}),
    ("llama-grouped", {"ffn": {"kind": "geglu"}}),
    ("llama-yarn", {"position": {"scaling": {"temperature": 1.0}}}),
    ("llama-yarn", {"position": {"scaling": {"fast": 4.0}}}),
    ("llama-yarn", {"position": {"scaling": {"slow": 2.0}}}),
    ("llama-yarn_as_deepseek_has_it", {"position": {"scaling": {"truncate": True}}}),
    ("llama-llama3", {"position": {"scaling": {"low": 1.1}}}),
    ("qwen3-some_windows", {"layers": [{"at": [2, 3], "attention": {"window": 6}}]}),
    ("qwen2-some_windows", {"layers": [{"at": [1], "attention": {"window": 6}}]}),
    ("mistral-window", {"attention": {"window": 4}}),
    ("deepseek_v2-query_latent", {"position": {"interleaved": False}}),
    ("deepseek_v2-query_latent", {"attention": {"eps": 1e-4}}),
    ("deepseek_v2-yarn", {"attention": {"scale": None}}),
    ("deepseek_v2-yarn", {"position": {"scaling": {"temperature": None}}}),
    ("deepseek_v2-yarn_with_two_temperatures", {"position": {"scaling": {"temperature": 1.0}}}),
    ("deepseek_v2-experts", {"ffn": {"router": {"scale": 1.0}}}),
    ("deepseek_v2-experts", {"ffn": {"router": {"normalise": True}}}),
    ("deepseek_v2-experts", {"ffn": {"router": {"keep_groups": 4}}}),
    ("deepseek_v3-experts", {"ffn": {"router": {"keep_groups": 3}}}),
    ("deepseek_v3-experts", {"ffn": {"router": {"normalise": False}}}),
    ("deepseek_v3-experts", {"ffn": {"active": 2}}),
    ("deepseek_v3-experts-plain_gates-halves-yarn", {"position": {"interleaved": True}}),
    ("mixtral-experts", {"ffn": {"router": {"normalise": False}}}),
    ("gpt2-tied", {"ffn": {"activation": "gelu"}}),
    ("bert-masked_lm", {"ffn": {"activation": "gelu_tanh"}}),
    ("bert-masked_lm", {"head": {"activation": "gelu_tanh"}}),
    ("bert-masked_lm", {"embedding": {"norm": {"eps": 1e-5}}}),
    ("roberta-classification", {"head": {"activation": "gelu"}}),
    ("electra-classification", {"head": {"activation": "gelu_tanh"}}),
    ("electra-discriminator", {"head": {"activation": "gelu_tanh"}}),
    ("electra-generator", {"head": {"activation": "gelu_tanh"}}),
    ("electra-generator", {"embedding": {"norm": {"eps": 1e-5}}}),
    ("mt5-untied", {"ffn": {"activation": "gelu"}}),
    ("t5-relu-tied", {"head": {"scale": False}}),
    ("t5-relu-tied", {"attention": {"scale": None}}),
    ("t5-relu-tied", {"position": {"far": 11}}),
    ("t5-gated_gelu-untied", {"ffn": {"activation": "gelu"}}),
]


@pytest.mark.parametrize(
    ("pair", "fault"),
    [pytest.param(case, fault, id=f"{name}-{fault}") for name, fault in FAULTS for case in CASES if case.name == name],
    indirect=["pair"],
)
@torch.no_grad()
def test_a_planted_fault_is_seen(pair: Pair, fault: dict[str, Any]) -> None:
    spec = validate(TransformerSpec, merge(_plain(pair.spec), fault, TransformerSpec))
    faulty = spec.build().eval()
    load_state(faulty, pair.ours.state_dict())
    ids, valid = padded(pair, "right")
    tokens = Tokens.of(ids, valid=valid)
    memory = tokens if pair.case.model_type in ENCODER_DECODERS else None
    wrong, right = faulty(tokens, memory=memory).logits, pair.ours(tokens, memory=memory).logits
    off = difference(wrong, right, None if right.dim() == 2 else valid)
    assert off > 2 * TOLERANCE


def _plain(spec: TransformerSpec) -> dict[str, Any]:
    return {name: value for name, value in spec.dump().items() if name != "kind"}


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "factor": 8.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_theta": 5e5,
        },
        {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "rope_theta": 1e6},
        {"rope_type": "yarn", "factor": 3.3, "original_max_position_embeddings": 39719, "rope_theta": 1e6},
    ],
    ids=lambda scaling: f"{scaling['rope_type']}-{scaling.get('factor')}",
)
def test_angles_far_out_are_those_of_published_code(scaling: dict[str, Any]) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    far = 131072
    config = {**LLAMA, "max_position_embeddings": far, "head_dim": 128, "rope_parameters": scaling}
    where = torch.tensor([[1, 100, 9999, 50021, far - 1]])
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**copy.deepcopy(config)))(torch.zeros(1), where)
    position = validate(TransformerSpec, find_layout("llama").to_spec(config)).position
    ours = position.build(128, 4, 40, far, True).rotation(where)
    assert ours is not None
    # a factor that is no power of two rounds once more
    slack = 0.0 if scaling.get("factor", 1.0) in (1.0, 8.0, 32.0) else 5e-5
    for mine, other in ((ours.cos, theirs[0]), (ours.sin, theirs[1])):
        assert (mine[0, 0] - other[0, :, :64]).abs().max() <= slack


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}, {"rope_type": "llama3", "factor": 4.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "finetuned": True}])  # fmt: skip
def test_configs_of_earlier_versions_mean_the_same(scaling: dict[str, Any] | None) -> None:
    layout = find_layout("llama")
    before = {"rope_theta": 5000.0, "rope_scaling": scaling}
    after = {**(scaling or {}), "rope_theta": 5000.0}
    after["rope_type"] = after.pop("type", after.get("rope_type", "default"))
    assert layout.to_spec(LLAMA | before) == layout.to_spec(LLAMA | {"rope_parameters": after})


def test_a_published_t5_config_says_by_tying_whether_states_are_scaled() -> None:
    layout = find_layout("t5")
    assert layout.to_spec(T5)["head"] == {"kind": "lm", "tied": True, "scale": True}
    assert layout.to_spec({**T5, "tie_word_embeddings": False})["head"] == {"kind": "lm", "tied": False, "scale": False}


@torch.no_grad()
def test_rows_of_a_roberta_table_that_stand_for_no_position_are_not_read_and_are_written_as_zeros() -> None:
    pair = _pair(next(case for case in CASES if case.name == "roberta-masked_lm"))
    name, ours = "roberta.embeddings.position_embeddings.weight", "encoder.positions.learned.weight"
    state = {**pair.state, name: pair.state[name].clone()}
    state[name][:2] = torch.nan
    read = pair.layout.to_ours(state, pair.spec)
    assert torch.equal(read[ours], state[name][2:]) and pair.spec.context == 38
    written = pair.layout.to_theirs(read, pair.spec)[name]
    assert torch.equal(written[2:], state[name][2:]) and not written[:2].any()
    assert pair.layout.to_config(pair.spec)["max_position_embeddings"] == 40


def test_a_mistral_config_without_the_key_has_the_window_of_the_first_version() -> None:
    layout = find_layout("mistral")
    assert layout.to_spec(LLAMA)["attention"]["window"] == 4096
    assert layout.to_spec({**LLAMA, "sliding_window": None})["attention"]["window"] is None


def test_a_published_mt5_config_is_untied_and_the_tensors_decide_where_it_says_otherwise() -> None:
    layout, says_tied = find_layout("mt5"), {**T5, "tie_word_embeddings": True}
    one, two = {"shared.weight": (59, 36)}, {"shared.weight": (59, 36), "lm_head.weight": (59, 36)}
    assert not layout.to_spec({**T5, "tie_word_embeddings": False})["head"]["tied"]
    assert layout.to_spec(says_tied, one)["head"]["tied"] and not layout.to_spec(says_tied, two)["head"]["tied"]


@pytest.mark.parametrize(
    ("model_type", "cls", "least"),
    [
        ("llama", "LlamaConfig", LLAMA),
        ("mistral", "MistralConfig", LLAMA),
        ("qwen2", "Qwen2Config", LLAMA),
        ("qwen3", "Qwen3Config", LLAMA),
        ("deepseek_v2", "DeepseekV2Config", DEEPSEEK),
        ("deepseek_v2", "DeepseekV2Config", {**DEEPSEEK, "first_k_dense_replace": 1, "num_experts_per_tok": 2}),
        ("deepseek_v3", "DeepseekV3Config", {**DEEPSEEK, "num_hidden_layers": 5}),
        ("mixtral", "MixtralConfig", LLAMA),
        ("gpt2", "GPT2Config", GPT2),
        ("bert", "BertConfig", BERT),
        ("electra", "ElectraConfig", BERT),
        ("roberta", "RobertaConfig", BERT),
        ("xlm_roberta", "XLMRobertaConfig", BERT),
        ("t5", "T5Config", T5),
        ("mt5", "MT5Config", T5),
    ],
)
def test_what_a_config_leaves_out_is_what_their_code_assumes(model_type: str, cls: str, least: dict[str, Any]) -> None:
    optional = {"num_key_value_heads", "rms_norm_eps", "num_decoder_layers"}
    optional |= {"kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}
    optional |= {"relative_attention_num_buckets", "relative_attention_max_distance"}
    least = {name: value for name, value in least.items() if name not in optional}
    if model_type == "deepseek_v3":
        del least["first_k_dense_replace"]
    if model_type.startswith("qwen"):  # 32 key/value heads, whatever the heads: no published config leaves it out
        least["num_key_value_heads"] = 2
    if model_type in ("mistral", "mixtral"):  # 8 of them
        least |= {"num_attention_heads": 16, "hidden_size": 64}
    if model_type == "deepseek_v3":  # 128 of them
        least["num_key_value_heads"] = least["num_attention_heads"]
    full = json.loads(getattr(transformers, cls)(**copy.deepcopy(least)).to_json_string())
    if model_type == "mt5":  # transformers 5 says of all that they are tied, and of published ones it is not true
        full["tie_word_embeddings"] = False
    layout = find_layout(model_type)
    assert _meant(layout, least) == _meant(layout, full)


def _meant(layout: Layout, config: dict[str, Any]) -> dict[str, Any]:
    spec = validate(TransformerSpec, layout.to_spec(config))
    with torch.device("meta"):
        return Model.of(spec, spec.build()).facts()
