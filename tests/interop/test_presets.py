"""Presets have the sizes that were published: those of transformers' own models of the same configs, tensor by tensor,
and the counts that their authors and model cards state."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.resources import files
from typing import Any

import pytest
import torch
from torch import nn

from torchstone.api import inspect
from torchstone.errors import TorchstoneError
from torchstone.interop.layout import find_layout, layouts, tensors_of
from torchstone.interop.presets import preset, preset_config, presets
from torchstone.model.measure import measure
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.spec import validate

PUBLISHED = {
    # with the embedding counted once where it is tied
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "distilgpt2": 81_912_576,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "deepseek-llm-7b": 6_910_365_696,
    "deepseek-llm-67b": 67_425_001_472,
    "deepseek-coder-1.3b": 1_346_471_936,
    "deepseek-coder-6.7b": 6_740_512_768,
    "deepseek-coder-33b": 33_342_991_360,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-coder-v2": 235_741_434_880,
    "deepseek-coder-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_404_352,
    "bitnet-b1.58-2b-4t": 2_412_820_480,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1.1-small": 76_961_152,
    "t5-v1.1-base": 247_577_856,
    "t5-v1.1-large": 783_150_080,
    "t5-v1.1-xl": 2_849_757_184,
    "t5-v1.1-xxl": 11_135_332_352,
    "mt5-small": 300_176_768,
    "mt5-base": 582_401_280,
    "mt5-large": 1_229_581_312,
    "mt5-xl": 3_742_619_648,
    "mt5-xxl": 12_921_057_280,
    # encoders without a head, with the pooler that all but ELECTRA's have
    "bert-base-uncased": 109_482_240,
    "bert-large-uncased": 335_141_888,
    "bert-base-cased": 108_310_272,
    "bert-base-multilingual-cased": 177_853_440,
    "minilm-l12-h384-uncased": 33_360_000,
    "multilingual-minilm-l12-h384": 117_653_760,
    "roberta-base": 124_645_632,
    "roberta-large": 355_359_744,
    "distilroberta-base": 82_118_400,
    "xlm-roberta-base": 278_043_648,
    "xlm-roberta-large": 559_890_432,
    "electra-small-discriminator": 13_483_008,
    "electra-base-discriminator": 108_891_648,
    "electra-large-discriminator": 334_092_288,
    "electra-base-generator": 33_511_168,
    "electra-large-generator": 50_999_552,
}

EXPERTS = {
    # billions as their papers state them: all, and what a token meets, there with the input embedding or without
    "deepseekmoe-16b": (16.4, 2.8, True),
    "deepseekmoe-145b": (144.6, 22.2, True),
    "deepseek-v2": (235.7, 21.4, True),
    "deepseek-v2-lite": (15.7, 2.5, False),
    "deepseek-coder-v2": (235.7, 21.4, True),
    "deepseek-coder-v2-lite": (15.7, 2.5, False),
    "deepseek-v3": (671.0, 36.6, False),
    "mixtral-8x7b": (46.7, 12.9, True),
    "mixtral-8x22b": (140.6, 39.2, True),
}

CONFIGURED = sorted(json.loads(files("torchstone.interop").joinpath("presets.json").read_text()))
"""Presets that have a published config.json."""


def built(name: str) -> Transformer:
    with torch.device("meta"):
        return preset(name).build()


def layers(name: str) -> int:
    config = preset_config(name)
    return next(config[key] for key in ("num_hidden_layers", "num_layers", "n_layer") if key in config)


def fewest_layers() -> set[str]:
    """The preset of each layout that is built the fastest."""
    of: dict[str, list[str]] = {}
    for name in CONFIGURED:
        of.setdefault(preset_config(name)["model_type"], []).append(name)
    return {min(names, key=layers) for names in of.values()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in fewest_layers() else [pytest.mark.slow]) for name in CONFIGURED]
)
def test_the_tensors_are_those_of_transformers_own_model(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config: dict[str, Any] = preset_config(name)
    layout, model = find_layout(config["model_type"]), built(name)
    architecture = config.pop("architectures", [next(iter(layout.architectures))])[0]
    kind = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        theirs = getattr(transformers, architecture)(kind)
        if not config.get("tie_word_embeddings", True) and hasattr(theirs, "lm_head"):
            # transformers 5 gives every T5 one matrix, also those that were published with two
            theirs.lm_head.weight = nn.Parameter(theirs.lm_head.weight.clone())
    ours = _together({name: tuple(tensor.shape) for name, tensor in layout.write(model.spec, tensors_of(model).get)})
    known = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert ours.items() <= known.items()
    copies = sum(model.spec.vocabulary or 0 for copy in layout.copies if copy.written and copy.name in ours)
    counted = [shape for name, shape in ours.items() if not name.endswith("e_score_correction_bias")]
    total = sum(torch.Size(shape).numel() for shape in counted) - copies
    assert total == sum(parameter.numel() for parameter in theirs.parameters())


_BEIT = {
    "encoder.relative_position_bias": "shared_position_bias",
    "encoder.layer.": "layers.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def _together(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes as transformers 5 has them in memory: all experts of a layer in one tensor, gates and ups above each other
    in it; Mixtral's experts under the name that others have, and BEiT's layers under those of a decoder."""
    found: dict[str, tuple[int, ...]] = {}
    kinds = {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
    kinds |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
    for name, shape in shapes.items():
        name = name.replace(".block_sparse_moe.", ".mlp.")
        if name.startswith("beit."):
            for old, new in _BEIT.items():
                name = name.replace(old, new)
        if one := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name):
            whole = f"{one[1]}.{kinds[one[3]]}"
            rows, inputs = found.get(whole, (0, 0, shape[1]))[1:]
            assert inputs == shape[1]
            found[whole] = (int(one[2]) + 1, rows + shape[0] * (one[2] == "0"), inputs)
        else:
            found[name] = shape
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_count_is_the_published_one(name: str) -> None:
    model, kind = built(name), preset_config(name)["model_type"]
    D = model.spec.width
    body = sum(parameter.numel() for path, parameter in model.named_parameters() if not path.startswith("head."))
    pooler = D * D + D if kind in ("bert", "roberta", "xlm-roberta") else 0
    unused = 2 * D if kind in ("roberta", "xlm-roberta") else 0  # rows of positions that none has
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert (body + pooler + unused if model.encoder and not model.decoder else whole) == PUBLISHED[name]


@pytest.mark.parametrize("name", EXPERTS)
def test_the_counts_of_experts_are_the_published_ones(name: str) -> None:
    counts, (whole, active, embedded) = measure(built(name)), EXPERTS[name]
    met = counts.active_with_embedding if embedded else counts.active_parameters
    assert (round(counts.parameters / 1e9, 1), round(met / 1e9, 1)) == (whole, active)


@pytest.mark.slow
def test_inspect_counts_deepseek_v3_without_its_selection_biases_and_its_prediction_module() -> None:
    found = inspect("deepseek-v3")
    assert found["parameters"] == 671_026_404_352 and found["buffers"] == 58 * 256 == 14_848
    assert found["active_parameters"] == 36_625_603_584


def test_the_experts_of_the_smallest_deepseekmoe_have_the_published_sizes() -> None:
    # table 1 of the paper: 0.24B of 1.89B parameters of experts are active
    with torch.device("meta"):
        model = validate(TransformerSpec, {**preset("deepseekmoe-2b").dump(), "vocabulary": 8192}).build()
    counts = measure(model)
    idle = counts.parameters - counts.active_with_embedding
    inside = [p.numel() for name, p in model.named_parameters() if ".ffn." in name and ".router." not in name]
    assert round(sum(inside) / 1e9, 2) == 1.89 and round((sum(inside) - idle) / 1e9, 2) == 0.24


@pytest.mark.parametrize("name", CONFIGURED)
def test_what_was_published_is_written_again(name: str) -> None:
    config = preset_config(name)
    written = find_layout(config["model_type"]).to_config(preset(name))
    scaling = config.get("rope_scaling")  # may say less than is written
    written |= {"rope_scaling": {key: written["rope_scaling"].get(key) for key in scaling}} if scaling else {}
    assert {key: written.get(key, "nothing") for key in config} == config


def test_every_layout_of_the_hub_has_presets() -> None:
    hub = {name for name in layouts() if find_layout(name).hub}
    assert {preset_config(name)["model_type"].replace("-", "_") for name in CONFIGURED} == hub


def test_an_unknown_name_is_one_sentence_with_the_nearest() -> None:
    with pytest.raises(TorchstoneError) as caught:
        preset("gpt2-lrge")
    assert str(caught.value) == "no preset 'gpt2-lrge' (did you mean 'gpt2-large'?)"
    with pytest.raises(TorchstoneError) as caught:
        preset("Llama-3.1-8B")
    assert str(caught.value) == "no preset 'Llama-3.1-8B' (did you mean 'llama-3.1-8b'?)"
    with pytest.raises(TorchstoneError) as caught:
        preset("?")
    assert str(caught.value) == f"no preset '?'; presets: {', '.join(presets())}"


@pytest.mark.parametrize("name", sorted(set(presets()) - set(CONFIGURED)))
def test_sizes_of_a_paper_build_and_have_no_config(name: str) -> None:
    spec = preset(name)
    with torch.device("meta"):  # where a paper does not say its vocabulary, a recipe takes the tokenizer's
        model = validate(TransformerSpec, {**spec.dump(), "vocabulary": spec.vocabulary or 1000}).build()
    assert model.spec.depth > 1
    with pytest.raises(TorchstoneError, match="a paper's sizes, not a published config"):
        preset_config(name)


def test_a_config_can_be_changed_without_changing_the_preset() -> None:
    config = preset_config("llama-3.1-8b")
    config["hidden_size"] = 1
    config["rope_scaling"]["factor"] = 1.0
    assert preset("llama-3.1-8b").width == 4096
    assert preset_config("llama-3.1-8b")["rope_scaling"]["factor"] == 8.0


def test_listing_them_needs_no_torch() -> None:
    code = "import sys; from torchstone.interop.presets import presets; assert presets(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
