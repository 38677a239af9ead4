"""What does not fit a layout is said in one sentence that names it; what fits is read one tensor at a time."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from torchstone.errors import TorchstoneError
from torchstone.interop import layout as layout_module
from torchstone.interop.layout import Layout, find_layout, layouts, load_state
from torchstone.model.site import initialise
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.spec import validate

CONFIG: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 13,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    },
    "gpt2": {"vocab_size": 13, "n_positions": 16, "n_embd": 8, "n_layer": 3, "n_head": 2},
    "t5": {"vocab_size": 13, "d_model": 8, "d_kv": 3, "d_ff": 12, "num_layers": 3, "num_heads": 2},
}
CONFIG["qwen3"] = {**CONFIG["llama"], "head_dim": 6}
CONFIG["qwen2"] = CONFIG["bert"] = CONFIG["roberta"] = CONFIG["xlm_roberta"] = CONFIG["llama"]
CONFIG["mistral"] = {**CONFIG["llama"], "num_key_value_heads": 1}
CONFIG["deepseek_v2"] = {
    **CONFIG["llama"],
    "first_k_dense_replace": 3,
    "kv_lora_rank": 6,
    "q_lora_rank": None,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 3,
}
CONFIG["deepseek_v3"] = {
    **CONFIG["deepseek_v2"],
    "num_key_value_heads": 2,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 5,
}
CONFIG["bitnet"] = {
    **CONFIG["mistral"],
    "quantization_config": {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
    },
}
CONFIG["mixtral"] = {**CONFIG["mistral"], "num_local_experts": 3}
MLA = {"kind": "mla", "heads": 2, "kv_latent": 6, "nope_dim": 4, "rope_dim": 2, "v_dim": 3}
CONFIG["electra"] = {**CONFIG["llama"], "embedding_size": 6}
CONFIG["mt5"] = CONFIG["t5"]
CONFIG["beit"] = {**CONFIG["bert"], "image_size": 4, "patch_size": 2, "use_shared_relative_position_bias": True}
ENCODER = {"vocab_size": 13, "encoder_embed_dim": 8, "encoder_attention_heads": 2, "encoder_layers": 3}
DECODER = {name.replace("encoder", "decoder"): value for name, value in ENCODER.items()}
CONFIG["torchscale_encoder"], CONFIG["torchscale_decoder"] = ENCODER, DECODER
CONFIG["torchscale_encoder_decoder"] = {**ENCODER, **DECODER, "share_all_embeddings": True}
CONFIG["torchscale_beit3"] = {**ENCODER, "img_size": 8, "patch_size": 4, "multiway": True, "no_output_layer": True}
CONFIG["torchscale_retnet"] = {
    **{name: value for name, value in DECODER.items() if "heads" not in name},
    **{"decoder_retention_heads": 2, "decoder_value_embed_dim": 12},
}


def made(model_type: str, **config: Any) -> tuple[Layout, TransformerSpec, Transformer, dict[str, torch.Tensor]]:
    """The layout, a spec, its model, and the model's checkpoint as they have it."""
    layout = find_layout(model_type)
    spec = validate(TransformerSpec, layout.to_spec({**CONFIG[model_type], **config}))
    model = spec.build()
    initialise(model, 0)
    return layout, spec, model, layout.to_theirs(model.state_dict(), spec)


def refused(layout: Layout, tensors: dict[str, torch.Tensor], spec: TransformerSpec) -> str:
    with pytest.raises(TorchstoneError) as caught:
        layout.to_ours(tensors, spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- tensors that do not fit


def test_a_missing_a_surplus_and_a_misshaped_tensor_are_named_in_one_sentence() -> None:
    layout, spec, _, tensors = made("llama")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(2)
    tensors["model.layers.2.self_attn.k_proj.weight"] = torch.zeros(8, 9)
    assert refused(layout, tensors, spec) == (
        "llama checkpoint: missing model.layers.1.mlp.up_proj.weight; surplus model.layers.0.mlp.extra.weight; "
        "model.layers.2.self_attn.k_proj.weight has shape (8, 9), not (8, 8)"
    )


def test_a_matrix_that_is_not_transposed_is_misshaped() -> None:
    layout, spec, _, tensors = made("gpt2")
    name = "transformer.h.0.mlp.c_fc.weight"
    tensors[name] = tensors[name].t()
    assert refused(layout, tensors, spec) == f"gpt2 checkpoint: {name} has shape (32, 8), not (8, 32)"


def test_names_that_differ_in_the_layer_alone_are_listed_together() -> None:
    layout, spec, _, tensors = made("llama")
    kept = {name: tensor for name, tensor in tensors.items() if "q_proj" not in name and "norm" not in name}
    assert refused(layout, kept, spec) == (
        "llama checkpoint: missing model.layers.{0,1,2}.self_attn.q_proj.weight, "
        "model.layers.{0,1,2}.input_layernorm.weight, model.layers.{0,1,2}.post_attention_layernorm.weight, "
        "model.norm.weight"
    )


def test_names_that_differ_in_the_expert_alone_are_listed_together() -> None:
    layout, spec, _, tensors = made("deepseek_v3")
    kept = {name: tensor for name, tensor in tensors.items() if "experts.3." not in name and "up_proj" not in name}
    assert refused(layout, kept, spec) == (
        "deepseek_v3 checkpoint: missing model.layers.0.mlp.up_proj.weight, "
        "model.layers.{1,2}.mlp.experts.{0,1,2,3}.up_proj.weight, model.layers.{1,2}.mlp.experts.3.gate_proj.weight, "
        "model.layers.{1,2}.mlp.experts.3.down_proj.weight, model.layers.{1,2}.mlp.shared_experts.up_proj.weight"
    )


def test_experts_lie_one_below_the_other_in_a_bank_gate_above_up() -> None:
    _, _, model, tensors = made("deepseek_v3")
    ours = model.get_parameter("decoder.layers.2.ffn.up.weight").view(4, 2, 5, 8)
    for e, kind in ((0, "gate"), (0, "up"), (3, "gate"), (3, "up")):
        theirs = tensors[f"model.layers.2.mlp.experts.{e}.{kind}_proj.weight"]
        assert torch.equal(theirs, ours[e, int(kind == "up")])


def test_a_tied_copy_may_be_there_but_must_be_the_same() -> None:
    layout, spec, model, tensors = made("llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    assert torch.equal(layout.to_ours(tensors, spec)["embedding.weight"], model.get_parameter("embedding.weight"))
    tensors["lm_head.weight"][0, 0] += 1
    assert refused(layout, tensors, spec) == (
        "llama checkpoint: lm_head.weight differs from model.embed_tokens.weight, to which the config ties it"
    )


def test_a_tied_matrix_is_found_under_either_name() -> None:
    layout, spec, model, tensors = made("llama", tie_word_embeddings=True)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    assert torch.equal(layout.to_ours(tensors, spec)["embedding.weight"], model.get_parameter("embedding.weight"))


def test_buffers_and_heads_not_asked_for_are_left_and_can_be_listed() -> None:
    layout, spec, _, tensors = made("bert", architectures=["BertForPreTraining"])
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    more = ["bert.embeddings.position_ids", "bert.pooler.dense.weight", "cls.seq_relationship.bias"]
    tensors |= {name: torch.zeros(2) for name in more}
    layout.to_ours(tensors, spec)
    assert layout.left(spec, dict.fromkeys([*shapes, *more], (2,))) == more


def test_names_of_bare_models_and_of_early_checkpoints_are_understood() -> None:
    layout, spec, model, tensors = made("bert")
    early = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in tensors.items()}
    early = {name.replace("LayerNorm.bias", "LayerNorm.beta"): tensor for name, tensor in early.items()}
    assert any(name.endswith("gamma") for name in early)
    load_state(model, layout.to_ours(early, spec))
    layout, spec, _, tensors = made("gpt2")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert layout.to_ours(bare, spec).keys() == layout.to_ours(tensors, spec).keys()
    del bare["h.1.ln_1.bias"]
    assert refused(layout, bare, spec) == "gpt2 checkpoint: missing transformer.h.1.ln_1.bias"


# -------------------------------------------------------------------------------------------------------- one at a time


@pytest.mark.parametrize("model_type", sorted(CONFIG))
def test_tensors_are_read_when_they_are_needed_and_not_before(model_type: str) -> None:
    layout, spec, _, tensors = made(model_type)
    copies = {copy.name for copy in layout.copies if copy.written} & tensors.keys()  # compared at once
    tensors = {name: tensor for name, tensor in tensors.items() if name not in copies or not spec.head.tied}
    asked: list[str] = []

    def get(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name]

    stream = layout.read(spec, {name: tensor.shape for name, tensor in tensors.items()}, get)
    assert not asked
    before = 0
    for step, (name, _) in zip(layout.steps(spec), stream, strict=True):
        assert step.ours == name and tuple(asked[before:]) == step.theirs
        before = len(asked)
    assert before == len(set(asked))


def test_names_are_checked_before_anything_is_read() -> None:
    layout, spec, _, tensors = made("llama")
    shapes = {name: tensor.shape for name, tensor in tensors.items() if name != "model.norm.weight"}
    with pytest.raises(TorchstoneError, match=r"missing model\.norm\.weight"):
        layout.read(spec, shapes, lambda name: pytest.fail(f"{name} was read"))


def test_a_model_on_the_meta_device_gets_memory_of_its_own() -> None:
    layout, spec, model, tensors = made("llama")
    with torch.device("meta"):
        empty = spec.build()
    half = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    load_state(empty, layout.read(spec, {name: tensor.shape for name, tensor in half.items()}, half.__getitem__))
    for name, parameter in empty.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.requires_grad
        assert torch.equal(parameter, model.get_parameter(name).to(torch.bfloat16).float())
    pointers = {tensor.data_ptr() for tensor in half.values()}
    assert not pointers & {parameter.data_ptr() for parameter in empty.parameters()}


def test_load_state_is_strict_and_changes_nothing_that_it_refuses() -> None:
    _, _, model, _ = made("llama")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    wrong = {name: parameter + 1 for name, parameter in before.items()}
    wrong["embedding.weight"] = torch.zeros(3, 8)
    wrong["decoder.norm.bias"] = wrong.pop("decoder.norm.weight")
    with pytest.raises(TorchstoneError) as caught:
        load_state(model, wrong)
    assert str(caught.value) == (
        "model state: missing decoder.norm.weight; surplus decoder.norm.bias; embedding.weight has shape (3, 8), "
        "not (13, 8)"
    )
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    with pytest.raises(TorchstoneError, match="model state: missing decoder"):
        load_state(model, iter([("embedding.weight", before["embedding.weight"])]))
    with pytest.raises(TorchstoneError, match=r"missing decoder\.norm\.weight"):
        find_layout("llama").to_theirs({k: v for k, v in before.items() if k != "decoder.norm.weight"}, model.spec)


# -------------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("llama", {"hidden_act": "silo"}, "llama config: hidden_act 'silo' is not supported (did you mean 'silu'?); "
         "supported: silu, swish, gelu, gelu_new, gelu_pytorch_tanh, relu, relu2"),
        ("llama", {"hidden_act": ["silu"]}, "llama config: hidden_act ['silu'] is not supported (did you mean "
         "'silu'?); supported: silu, swish, gelu, gelu_new, gelu_pytorch_tanh, relu, relu2"),
        ("llama", {"hidden_size": None}, "llama config: hidden_size is required"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
         "llama config: rope_type 'dynamic' is not supported; supported: default, linear, llama3, yarn"),
        ("llama", {"rope_scaling": "yarn"}, "llama config: rope_parameters needs a mapping, got 'yarn'"),
        ("llama", {"partial_rotary_factor": 0.5},
         "llama config: partial_rotary_factor 0.5 is not supported; supported: 1.0"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]},
         "llama config: architecture 'LlamaForSequenceClassification' is not supported; supported: LlamaForCausalLM"),
        ("qwen3", {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
         "qwen3 config: layer_types 'linear_attention' is not supported (did you mean 'sliding_attention'?); "
         "supported: full_attention, sliding_attention"),
        ("deepseek_v2", {"first_k_dense_replace": 1}, "deepseek_v2 config: num_experts_per_tok is required"),
        ("deepseek_v2", {"first_k_dense_replace": 1, "moe_layer_freq": 2},
         "deepseek_v2 config: moe_layer_freq 2 is not supported; supported: 1"),
        ("deepseek_v2", {"norm_topk_prob": True},
         "deepseek_v2 config: norm_topk_prob True is not supported; supported: False"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "deepseek_v2 config: topk_method 'noaux_tc' is not supported; "
         "supported: greedy, group_limited_greedy"),
        ("deepseek_v3", {"scoring_func": "softmax"},
         "deepseek_v3 config: scoring_func 'softmax' is not supported; supported: 'sigmoid'"),
        ("mixtral", {"router_jitter_noise": 0.1},
         "mixtral config: router_jitter_noise 0.1 is not supported; supported: 0.0"),
        ("deepseek_v2", {"num_key_value_heads": 1},
         "deepseek_v2 config: num_key_value_heads 1 is not supported; supported: 2"),
        ("deepseek_v2", {"attention_bias": True},
         "deepseek_v2 config: attention_bias True is not supported; supported: False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True},
         "gpt2 config: scale_attn_by_inverse_layer_idx True is not supported; supported: False"),
        ("bert", {"position_embedding_type": "relative_key"},
         "bert config: position_embedding_type 'relative_key' is not supported; supported: 'absolute'"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
         "qwen2 config: layer_types 'chunked_attention' is not supported (did you mean 'full_attention'?); supported: "
         "full_attention, sliding_attention"),
        ("mistral", {"rope_scaling": {"type": "longrope"}},
         "mistral config: rope_type 'longrope' is not supported; supported: default, linear, llama3, yarn"),
        ("roberta", {"pad_token_id": 0}, "roberta config: pad_token_id 0 is not supported; supported: 1"),
        ("roberta", {"is_decoder": True}, "roberta config: is_decoder True is not supported; supported: False"),
        ("xlm_roberta", {"pad_token_id": 2}, "xlm-roberta config: pad_token_id 2 is not supported; supported: 1"),
        ("electra", {"architectures": ["ElectraForTokenClassification"]},
         "electra config: architecture 'ElectraForTokenClassification' is not supported (did you mean "
         "'ElectraForSequenceClassification'?); supported: ElectraForPreTraining, ElectraForMaskedLM, "
         "ElectraForSequenceClassification"),
        ("electra", {"position_embedding_type": "relative_key"},
         "electra config: position_embedding_type 'relative_key' is not supported; supported: 'absolute'"),
        ("mt5", {"is_encoder_decoder": False},
         "mt5 config: is_encoder_decoder False is not supported; supported: True"),
        ("t5", {"feed_forward_proj": "gated-celu"},
         "t5 config: feed_forward_proj 'gated-celu' is not supported (did you mean 'gated-relu'?); supported: gelu, "
         "gelu_new, gelu_pytorch_tanh, relu, relu2, silu, swish, gated-silu, gated-swish, gated-gelu, gated-gelu_new, "
         "gated-gelu_pytorch_tanh, gated-relu, gated-relu2"),
    ],
)  # fmt: skip
def test_an_option_that_the_backbone_has_not_is_one_sentence(
    model_type: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(TorchstoneError) as caught:
        find_layout(model_type).to_spec({**CONFIG[model_type], **change})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("llama", {"position": {"kind": "alibi"}}, "the llama layout has no place for position alibi; it takes rotary"),
        ("llama", {"attention": {"kind": "softmax", "heads": 2, "softcap": 30.0}},
         "the llama layout has no place for decoder.layers.0.attention.softcap 30.0; it takes None"),
        ("llama", {"attention": {"kind": "softmax", "heads": 2, "qk_norm": True}},
         "the llama layout has no place for decoder.layers.0.attention.qk_norm True; it takes False"),
        ("llama", {"position": {"kind": "rotary", "scaling": {"kind": "ntk", "factor": 2.0}}},
         "rotary scaling ntk has no place in published layouts; they take linear, llama3 or yarn"),
        ("llama", {"layers": [{"at": [2], "ffn": {"hidden": 20}}]},
         "the llama layout has no place for decoder.layers.2.ffn.hidden 20; it takes 12"),
        ("llama", {"width": 9, "attention": {"kind": "softmax", "heads": 2, "head_dim": 4}},
         "the llama layout has no place for width 9, which 2 heads do not divide; it takes a multiple, whatever the "
         "head_dim"),
        ("llama", {"causal": False}, "the llama layout has no place for an encoder; it takes decoder"),
        ("llama", {"encoder": {}}, "the llama layout has no place for an encoder and decoder; it takes decoder"),
        ("llama", {"block": "parallel"}, "the llama layout has no place for block parallel; it takes sequential"),
        ("llama", {"embedding": {"scale": True}},
         "the llama layout has no place for embedding.scale True; it takes False"),
        ("qwen3", {"layers": [{"at": [1], "attention": {"window": 4}}, {"at": [2], "attention": {"window": 5}}]},
         "the qwen3 layout has no place for decoder.layers.2.attention.window 5; it takes 4"),
        ("gpt2", {"attention": {"kind": "softmax", "heads": 2, "bias": "all", "scale": 0.3}},
         "the gpt2 layout has no place for decoder.layers.0.attention.scale 0.3; it takes 0.5"),
        ("deepseek_v2", {"attention": {"kind": "softmax", "heads": 2}},
         "the deepseek_v2 layout has no place for attention softmax; it takes mla"),
        ("deepseek_v2", {"attention": {**MLA, "scale": 0.5}},
         "layouts of latent attention have no place for attention.scale 0.5; they take another one than 1 / "
         "sqrt(nope_dim + rope_dim) with position.scaling yarn alone"),
        ("deepseek_v2", {"ffn": {"kind": "moe", "router": "sigmoid_bias"}},
         "the deepseek_v2 layout has no place for router sigmoid_bias; it takes topk"),
        ("deepseek_v2", {"ffn": {"kind": "moe", "gated": False, "shared": 1}},
         "the deepseek_v2 layout has no place for decoder.layers.0.ffn.gated False; it takes True"),
        ("deepseek_v3", {"layers": [{"at": [1], "ffn": {"kind": "swiglu"}}]},
         "the deepseek_v3 layout has no place for decoder.layers.1.ffn.kind swiglu; it takes moe"),
        ("bitnet", {"residual": "pre"}, "the bitnet layout has no place for residual pre; it takes subln"),
        ("bitnet", {"linear": {"kind": "bitlinear", "norm": "none", "weights": "binary"}},
         "the bitnet layout has no place for decoder.layers.0.linear.weights binary; it takes ternary"),
        ("mixtral", {"ffn": {"kind": "moe", "experts": 3, "hidden": 12}},
         "the mixtral layout has no place for decoder.layers.0.ffn.router.normalise False; it takes True"),
        ("mixtral", {"ffn": {"kind": "moe", "experts": 3, "shared": 1, "router": {"normalise": True}}},
         "the mixtral layout has no place for decoder.layers.0.ffn.shared 1; it takes 0"),
        ("mixtral", {"layers": [{"at": [1], "ffn": {"kind": "swiglu"}}]},
         "the mixtral layout has no place for ffn swiglu; it takes moe"),
        ("deepseek_v2", {"attention": {**MLA, "eps": 1e-5}},
         "the deepseek_v2 layout has no place for decoder.layers.0.attention.eps 1e-05; it takes 1e-06"),
        ("deepseek_v2", {"position": {"kind": "rotary", "interleaved": False}},
         "the deepseek_v2 layout has no place for decoder.layers.0.position.interleaved False; it takes True"),
        ("bert", {"head": {"kind": "lm"}}, "the bert layout has no place for head lm; it takes mlm or classification"),
        ("qwen2", {"attention": {"kind": "softmax", "heads": 2, "bias": "none"}},
         "the qwen2 layout has no place for decoder.layers.0.attention.bias none; it takes qkv"),
        ("qwen2", {"layers": [{"at": [1], "attention": {"window": 4}}, {"at": [2], "attention": {"window": 5}}]},
         "the qwen2 layout has no place for decoder.layers.2.attention.window 5; it takes 4"),
        ("mistral", {"layers": [{"at": [1], "attention": {"window": 4}}]},
         "the mistral layout has no place for decoder.layers.1.attention.window 4; it takes 4096"),
        ("mistral", {"attention": {"kind": "softmax", "heads": 2, "bias": "all"}},
         "the mistral layout has no place for decoder.layers.0.attention.bias all; it takes none"),
        ("bert", {"embedding": {"size": 6, "types": 2, "norm": {"kind": "layernorm", "eps": 1e-12}}},
         "the bert layout has no place for embedding.size 6; it takes 8"),
        ("bert", {"head": {"kind": "classification", "pooler": True, "activation": "gelu"}},
         "the bert layout has no place for head.activation gelu; it takes tanh"),
        ("roberta", {"head": {"kind": "classification", "pooler": False}},
         "the roberta layout has no place for head.pooler False; it takes True"),
        ("xlm_roberta", {"head": {"kind": "mlm", "activation": "relu"}},
         "the xlm-roberta layout has no place for head.activation relu; it takes gelu"),
        ("electra", {"head": {"kind": "token_classification", "classes": 3, "transform": True}},
         "the electra layout has no place for head.classes 3; it takes 1"),
        ("electra", {"head": {"kind": "token_classification", "classes": 1}},
         "the electra layout has no place for head.transform False; it takes True"),
        ("mt5", {"head": {"tied": True, "scale": True}},
         "the mt5 layout has no place for head.scale True; it takes False"),
        ("t5", {"head": {"tied": False, "scale": True}},
         "the t5 layout has no place for head.scale where head.tied is false; it takes a tied head"),
        ("t5", {"ffn": {"kind": "geglu", "hidden": 12}},
         "the t5 layout has no place for decoder.layers.0.ffn.activation gelu; it takes gelu_tanh"),
        ("llama", {"vocabulary": None},
         "vocabulary: is required to build the model (a recipe takes it from its tokenizer)"),
    ],
)  # fmt: skip
def test_a_spec_that_the_layout_cannot_say_is_one_sentence(
    model_type: str, change: dict[str, Any], message: str
) -> None:
    layout = find_layout(model_type)
    spec = validate(TransformerSpec, {**layout.to_spec(CONFIG[model_type]), **change})
    with pytest.raises(TorchstoneError) as caught:
        layout.to_config(spec)
    assert str(caught.value) == message


def test_what_only_training_sees_does_not_hinder_writing() -> None:
    layout = find_layout("llama")
    spec = layout.to_spec(CONFIG["llama"])
    spec = {**spec, "dropout": 0.3, "drop_path": 0.1, "residual": {"kind": "pre", "std": 0.5}}
    assert layout.to_config(validate(TransformerSpec, spec))["hidden_size"] == 8


def test_sizes_left_to_the_backbone_are_written_as_numbers() -> None:
    spec = validate(TransformerSpec, {"vocabulary": 13, "width": 24, "depth": 2, "attention": {"heads": 3}})
    config = find_layout("llama").to_config(spec)
    assert config["head_dim"] == 8 and config["num_key_value_heads"] == 3
    assert config["intermediate_size"] == spec.build().get_parameter("decoder.layers.0.ffn.down.weight").shape[1]


def test_rows_of_keys_and_values_lie_head_by_head_in_a_deepseek_checkpoint() -> None:
    _, _, model, tensors = made("deepseek_v2")
    ours = model.get_parameter("decoder.layers.1.attention.kv_up.weight")
    k, v = ours[:8].view(2, 4, 6), ours[8:].view(2, 3, 6)
    theirs = tensors["model.layers.1.self_attn.kv_b_proj.weight"]
    assert torch.equal(theirs, torch.cat([k[0], v[0], k[1], v[1]]))


def test_a_deepseek_config_that_says_null_has_no_latent_of_queries_and_one_without_the_key_has() -> None:
    config = {name: value for name, value in CONFIG["deepseek_v2"].items() if name != "q_lora_rank"}
    layout = find_layout("deepseek_v2")
    assert layout.to_spec(config)["attention"]["q_latent"] == 1536
    assert layout.to_spec({**config, "q_lora_rank": None})["attention"]["q_latent"] is None


def test_which_of_equal_forms_runs_does_not_hinder_writing() -> None:
    layout = find_layout("deepseek_v2")
    spec = layout.to_spec(CONFIG["deepseek_v2"])
    spec["attention"] |= {"form": "naive", "scale": 6**-0.5}
    assert layout.to_config(validate(TransformerSpec, spec)) == layout.to_config(
        validate(TransformerSpec, layout.to_spec(CONFIG["deepseek_v2"]))
    )


def test_t5_tells_from_the_tensors_whether_the_head_is_tied_where_the_config_cannot() -> None:
    config = {**CONFIG["t5"], "tie_word_embeddings": True, "scale_decoder_outputs": False}
    layout = find_layout("t5")
    assert layout.to_spec(config, {"shared.weight": (13, 8)})["head"]["tied"]
    assert not layout.to_spec(config, {"shared.weight": (13, 8), "lm_head.weight": (13, 8)})["head"]["tied"]


# -------------------------------------------------------------------------------------------------------------- finding


def test_an_unknown_model_type_is_one_sentence_with_the_list() -> None:
    with pytest.raises(TorchstoneError) as caught:
        find_layout("lama")
    assert str(caught.value) == (
        f"no layout for model_type 'lama' (did you mean 'llama'?); layouts: {', '.join(layouts())}"
    )
    assert layouts() == sorted(layouts()) and set(layouts()) == set(CONFIG)


def test_finding_a_layout_imports_its_file_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    home = "torchstone.interop.layouts."
    for name in [name for name in sys.modules if name.startswith(home)]:
        monkeypatch.delitem(sys.modules, name)
    find_layout("bert")
    assert {name.removeprefix(home) for name in sys.modules if name.startswith(home)} == {"_shared", "bert"}


def test_the_size_of_vectors_may_be_left_to_the_width_or_said() -> None:
    layout = find_layout("bert")
    spec = layout.to_spec(CONFIG["bert"])
    said = {**spec, "embedding": {**spec["embedding"], "size": 8}}
    assert layout.to_config(validate(TransformerSpec, said)) == layout.to_config(validate(TransformerSpec, spec))


def test_no_layout_needs_transformers() -> None:
    home = Path(layout_module.__file__).parent
    for path in [home / "layout.py", *(home / "layouts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "transformers" for name in names), path
