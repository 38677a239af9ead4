"""Checkpoints with experts through files: selection biases keep their precision, quantised blocks are read, what a
prediction module stores is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchstone.errors import TorchstoneError
from torchstone.interop.exporting import export_run
from torchstone.interop.importing import import_run
from torchstone.keys import Key
from torchstone.train.checkpoint import TensorFile, stream_tensors

transformers = pytest.importorskip("transformers")
BIAS = "decoder.layers.1.ffn.router.bias"
UP, DOWN = "decoder.layers.1.ffn.up.weight", "decoder.layers.1.ffn.down.weight"
BLOCK = (4, 16)


def checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A DeepSeek-V3 of two layers, the second with experts, as transformers writes it; gives theirs."""
    config = transformers.DeepseekV3Config(
        vocab_size=40, hidden_size=24, intermediate_size=30, num_hidden_layers=2, first_k_dense_replace=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, kv_lora_rank=12, q_lora_rank=10,
        qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, n_routed_experts=6, num_experts_per_tok=2, n_group=2,
        topk_group=1, moe_intermediate_size=10, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model, generator = transformers.DeepseekV3ForCausalLM(config).eval(), Key(1).generator()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("correction_bias"))):
            tensor.copy_((0.3 if tensor.dim() > 1 else 1.0) * torch.randn(tensor.shape, generator=generator))
    model.config._experts_implementation = "eager"
    model.save_pretrained(folder)
    if dtype is not torch.float32:
        tensors = load_file(folder / "model.safetensors")
        save_file(
            {n: t if n.endswith("_bias") else t.to(dtype) for n, t in tensors.items()}, folder / "model.safetensors"
        )
    return model


def same(ours: Any, theirs: Any) -> None:
    ids = torch.randint(40, (2, 9), generator=Key(3).generator())
    with torch.no_grad():
        got, want = ours(ids).logits, theirs(ids).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("form", ["hf", "torchstone"])
def test_experts_come_in_and_go_out_with_the_biases_of_their_choice(tmp_path: Path, form: str) -> None:
    theirs = checkpoint(tmp_path / "hf")
    run = import_run(tmp_path / "hf", tmp_path / "run")
    ours = run.model()
    assert torch.equal(ours.get_buffer(BIAS), theirs.model.layers[1].mlp.gate.e_score_correction_bias)
    same(ours, theirs)
    assert export_run(run, tmp_path / "out", to=form) == ("deepseek_v3" if form == "hf" else "torchstone")
    again = import_run(tmp_path / "out", tmp_path / "again").model()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())
    if form == "hf":
        before, after = (load_file(tmp_path / where / "model.safetensors") for where in ("hf", "out"))
        assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_biases_of_choice_stay_in_float32_where_weights_are_narrower(tmp_path: Path) -> None:
    checkpoint(tmp_path / "hf", torch.bfloat16)
    run = import_run(tmp_path / "hf", tmp_path / "run")
    file = TensorFile(run.path / "model.safetensors")
    assert file.get(UP).dtype == file.dtype == torch.bfloat16 and file.get(BIAS).dtype == torch.float32
    export_run(run, tmp_path / "half", to="hf", dtype="fp16")
    written, before = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "hf"))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(written[name], before[name]) and written[name].dtype == torch.float32
    assert {tensor.dtype for other, tensor in written.items() if other != name} == {torch.float16}


def test_the_module_that_predicts_a_further_token_is_left(tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    more = {"model.layers.2.eh_proj.weight": torch.zeros(24, 48), "model.layers.2.enorm.weight": torch.zeros(24)}
    save_file({**tensors, **more}, tmp_path / "hf" / "model.safetensors")
    same(import_run(tmp_path / "hf", tmp_path / "run").model(), theirs)
    save_file({**tensors, "model.layers.3.enorm.weight": torch.zeros(24)}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(TorchstoneError, match=r"surplus model\.layers\.3\.enorm\.weight"):
        import_run(tmp_path / "hf", tmp_path / "other")


def quantise(folder: Path, **quantisation: Any) -> dict[str, torch.Tensor]:
    """Quantise the projections of a checkpoint as the published one is; gives what the numbers then mean."""
    rows, columns = BLOCK
    meant, stored = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            meant[name] = stored[name] = tensor if name.endswith("_bias") else tensor.bfloat16()
            continue
        w = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
        scales = torch.empty(-(-tensor.shape[0] // rows), -(-tensor.shape[1] // columns))
        meant[name] = torch.empty(tensor.shape)
        for o in range(0, tensor.shape[0], rows):
            for i in range(0, tensor.shape[1], columns):
                at = slice(o, o + rows), slice(i, i + columns)
                scale = tensor[at].abs().max() / 448
                scales[o // rows, i // columns] = scale
                w[at] = (tensor[at] / scale).to(torch.float8_e4m3fn)
                meant[name][at] = w[at].float() * scale
        stored |= {name: w, f"{name}_scale_inv": scales}
    save_file(stored, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    told = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK), **quantisation}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
    return meant


def test_weights_of_8_bits_in_blocks_are_read_as_what_they_mean(tmp_path: Path) -> None:
    checkpoint(tmp_path / "hf")
    whole = load_file(tmp_path / "hf" / "model.safetensors")
    meant = quantise(tmp_path / "hf")
    file = TensorFile(import_run(tmp_path / "hf", tmp_path / "run").path / "model.safetensors")
    assert file.dtype == torch.bfloat16
    expert = "model.layers.1.mlp.experts.{}.{}.weight"
    names = [expert.format(e, kind) for e in range(6) for kind in ("gate_proj", "up_proj")]
    assert torch.equal(file.get(UP), torch.cat([meant[name] for name in names]).bfloat16())
    downs = torch.cat([meant[expert.format(e, "down_proj")] for e in range(6)])
    assert torch.equal(file.get(DOWN), downs.bfloat16())
    assert torch.equal(file.get(BIAS), meant["model.layers.1.mlp.gate.e_score_correction_bias"])
    exact = torch.cat([whole[expert.format(e, "down_proj")] for e in range(6)])
    error = (downs - exact).abs() / exact.abs().clamp(min=exact.abs().max() / 100)
    assert 1e-3 < error.max() <= 2**-4  # three bits of mantissa


def test_what_is_quantised_otherwise_or_lacks_scales_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint(tmp_path / "hf")
    quantise(tmp_path / "hf", weight_block_size=None)
    with pytest.raises(TorchstoneError, match="without a weight_block_size of two numbers"):
        import_run(tmp_path / "hf", tmp_path / "run")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = list(BLOCK)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    scales = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"
    save_file({**tensors, scales: torch.zeros(7, 2)}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(TorchstoneError, match=r"experts\.3\.up_proj\.weight_scale_inv is \(7, 2\), not \(3, 2\)"):
        import_run(tmp_path / "hf", tmp_path / "run")
    save_file({n: t for n, t in tensors.items() if n != scales}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(TorchstoneError, match=r"experts\.3\.up_proj\.weight is float8_e4m3fn"):
        import_run(tmp_path / "hf", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensors_of_several_precisions_lie_in_one_file_each_at_a_multiple_of_its_size(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor(True), "b": torch.arange(3), "c": torch.ones(5), "d": torch.full((3,), 0.1)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    kept = {"a": torch.bool, "b": torch.int64, "d": torch.float32}
    stream_tensors(tmp_path / "x.safetensors", shapes, tensors.items(), torch.bfloat16, kept=kept)
    read = dict(TensorFile(tmp_path / "x.safetensors"))  # compares with the checksum
    wanted = {**tensors, "c": tensors["c"].bfloat16()}
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[name], wanted[name]) and read[name].dtype == wanted[name].dtype for name in read)
