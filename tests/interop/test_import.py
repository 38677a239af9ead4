"""Import and export through the files that people exchange."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from torchstone.errors import TorchstoneError
from torchstone.generate import Engine, Sampling
from torchstone.interop.exporting import export_run
from torchstone.interop.importing import import_run
from torchstone.train import train
from torchstone.train.run import RunFolder

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}


def save(folder: Path, model: Any, shard: str = "5GB", tokenizer: bool = True) -> Path:
    """A checkpoint as transformers writes it, with a tokenizer of bytes."""
    from torchstone.data.tokenizers.bytes import BytesSpec

    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = 257
    model.save_pretrained(folder, max_shard_size=shard)
    if tokenizer:
        BytesSpec().load(lambda: iter(()), "", None).save(folder)  # type: ignore[arg-type]
    return folder


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **more})).eval()


def logits_close(ours: Any, theirs: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        got, want = ours(ids).logits, theirs(ids).logits
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_an_imported_run_computes_the_same_and_brings_its_tokenizer_and_settings(tmp_path: Path, shard: str) -> None:
    model = llama()
    source = save(tmp_path / "hf", model, shard)
    assert (source / "model.safetensors.index.json").exists() == (shard != "5GB")
    run = import_run(source, tmp_path / "run")
    ids = torch.randint(300, (2, 9))
    logits_close(run.model(), model, ids)
    assert run.tokenizer().encode("def f") == [ord(c) for c in "def f"]
    assert json.loads((run.path / "generation_config.json").read_text())["eos_token_id"] == 257
    assert Engine.of_run(run).eos == {257}
    prompt = [[ord(c) for c in "ab"]]
    ours = Engine.of_run(run).generate(prompt, Sampling(temperature=0, max_new_tokens=5))[0].ids
    theirs = model.generate(torch.tensor(prompt), max_new_tokens=5, do_sample=False)[0, 2:].tolist()
    assert ours == theirs


def test_an_imported_run_keeps_the_precision_of_its_source(tmp_path: Path) -> None:
    run = import_run(save(tmp_path / "hf", llama().bfloat16()), tmp_path / "run")
    from torchstone.train.checkpoint import TensorFile

    assert TensorFile(run.path / "model.safetensors").dtype == torch.bfloat16
    assert next(run.model().parameters()).dtype == torch.float32


def test_names_of_classes_come_along_and_go_out_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 40, "max_position_embeddings": 64}
    config = transformers.BertConfig(**sizes, id2label={0: "bad", 1: "fair", 2: "good"})
    model = transformers.BertForSequenceClassification(config).eval()
    run = import_run(save(tmp_path / "hf", model), tmp_path / "run")
    assert run.config["id2label"] == {"0": "bad", "1": "fair", "2": "good"}
    export_run(run, tmp_path / "out")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").id2label == {0: "bad", 1: "fair", 2: "good"}


def test_a_special_token_that_the_layout_has_no_place_for_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 40, "max_position_embeddings": 66}
    model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**sizes))
    run = import_run(save(tmp_path / "hf", model), tmp_path / "run")
    settings = run.path / "generation_config.json"
    settings.write_text(json.dumps({**run.generation_settings(), "pad_token_id": 0}))
    with pytest.raises(TorchstoneError, match="the roberta layout has no place for pad_token_id 0; it takes 1"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_goes_on_from_an_imported_run(tmp_path: Path) -> None:
    run = import_run(save(tmp_path / "hf", llama()), tmp_path / "run")
    recipe = {**tiny.recipe(tmp_path), "init_from": str(run.path)}
    del recipe["model"], recipe["data"]["tokenizer"]
    more = train(recipe, out=tmp_path / "more", quiet=True)
    assert more.recipe.model.width == 32 and more.tokenizer().hash == run.tokenizer().hash
    losses = [row["valid_loss"] for row in more.metrics() if "valid_loss" in row]
    assert losses[-1] < losses[0]


BROKEN: dict[str, tuple[Any, str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no checkpoint (it has no config.json)"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
    "pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "there is pytorch_model.bin, but pickle is not read",
    ),
    "cut": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-999]),
        "truncated or no safetensors file",
    ),
    "unknown layout": (lambda folder: edit(folder, model_type="mamba"), "no layout for model_type 'mamba'"),
    "unknown architecture": (lambda folder: edit(folder, architectures=["LlamaForTokens"]), "'LlamaForTokens' is not"),
    "too deep": (lambda folder: edit(folder, num_hidden_layers=3), "missing model.layers.2.self_attn.o_proj.weight"),
    "too shallow": (lambda folder: edit(folder, num_hidden_layers=1), "surplus model.layers.1."),
    "other shape": (lambda folder: edit(folder, intermediate_size=40), "has shape (48, 32), not (40, 32)"),
    "quantised": (
        lambda folder: edit(folder, quantization_config={"quant_method": "gptq"}),
        "weights quantised by 'gptq'",
    ),
    "tokenizer": (lambda folder: edit(folder, vocab_size=200), "not (200, 32)"),
}


def edit(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkpoint_is_refused_by_name_and_nothing_is_written(tmp_path: Path, what: str) -> None:
    source = save(tmp_path / "hf", llama())
    harm, message = BROKEN[what]
    harm(source)
    before = tiny.listing(tmp_path)
    with pytest.raises(TorchstoneError) as error:
        import_run(source, tmp_path / "run")
    assert message in str(error.value)
    assert tiny.listing(tmp_path) == before


def test_an_out_folder_that_is_not_free_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "hf", llama())
    run = import_run(source, tmp_path / "run")
    with pytest.raises(TorchstoneError, match="holds a run already"):
        import_run(source, run.path)
    with pytest.raises(TorchstoneError, match="holds files already"):
        export_run(run, source)


def test_a_source_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TorchstoneError, match="no such folder"):
        import_run(tmp_path / "nowhere", tmp_path / "run")


RELOAD = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchstone":
            raise ImportError("torchstone is not here")
sys.meta_path.insert(0, Block())
import torch, transformers
model, info = getattr(transformers, sys.argv[3]).from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
assert transformers.AutoTokenizer.from_pretrained(sys.argv[1]).vocab_size
ids = torch.arange(24).view(2, 12) * 7 % 250
with torch.no_grad():
    torch.save(model.eval()(ids).logits, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", "AutoModelForMaskedLM"])
def test_an_exported_run_loads_where_there_is_no_torchstone(tmp_path: Path, auto: str) -> None:
    masked = {"norm": "layernorm", "residual": "post", "position": "learned", "embedding": {"types": 2, "norm": {}}}
    fields: dict[str, Any] = {"model": {**tiny.MODEL, "ffn": {"kind": "swiglu", "hidden": 24}}}
    if auto == "AutoModelForMaskedLM":
        norm = {"kind": "layernorm", "eps": 1e-12}
        masked = {"norm": norm, "residual": "post", "position": "learned", "embedding": {"types": 2, "norm": norm}}
        ffn = {"kind": "mlp", "hidden": 24, "bias": True}
        body = {**tiny.MODEL, **masked, "attention": {"heads": 2, "bias": "all"}, "ffn": ffn}
        fields = {**tiny.MASKED, "model": {**body, "causal": False, "head": "mlm"}}
    run = train(tiny.recipe(tmp_path, **fields), out=tmp_path / "run", quiet=True)
    layout = export_run(run, tmp_path / "hf")
    assert layout == ("bert" if "Masked" in auto else "llama")
    script = tmp_path / "reload.py"
    script.write_text(RELOAD)
    made = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "hf"), str(tmp_path / "logits.pt"), auto],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    theirs = torch.load(tmp_path / "logits.pt")
    with torch.no_grad():
        ours = run.model()(torch.arange(24).view(2, 12) * 7 % 250).logits
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    again = import_run(tmp_path / "hf", tmp_path / "again")
    for name, value in run.model().state_dict().items():
        assert torch.equal(again.model().state_dict()[name], value), name


def test_shards_hold_the_same_as_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = import_run(save(tmp_path / "hf", llama()), tmp_path / "run")
    monkeypatch.setattr("torchstone.interop.exporting._SHARD", 20_000)
    export_run(run, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    logits_close(run.model(), model.eval(), torch.randint(300, (2, 9)))


def test_a_form_can_be_asked_for_and_is_refused_where_it_does_not_fit(tmp_path: Path) -> None:
    run = import_run(save(tmp_path / "hf", llama()), tmp_path / "run")
    for to, message in (
        ("gpt2", "the gpt2 layout has no place for"),
        ("lama", "did you mean .llama."),
        ("peft", "has no LoRA to export"),
    ):
        with pytest.raises(TorchstoneError, match=message):
            export_run(run, tmp_path / "out", to=to)
    with pytest.raises(TorchstoneError, match="dtype is one of fp32, bf16, fp16"):
        export_run(run, tmp_path / "out", dtype="int8")
    assert not (tmp_path / "out").exists()
    assert export_run(run, tmp_path / "out", dtype="bf16") == "llama"
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_model_without_a_published_layout_goes_out_as_our_own_and_comes_back(tmp_path: Path) -> None:
    run = train(tiny.recipe(tmp_path, model={"position": "alibi"}), out=tmp_path / "run", quiet=True)
    assert export_run(run, tmp_path / "out") == "torchstone"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_torchstone.TorchstoneForCausalLM"
    again = import_run(tmp_path / "out", tmp_path / "again")
    for name, value in run.model().state_dict().items():
        assert torch.equal(again.model().state_dict()[name], value), name
    assert isinstance(again, RunFolder) and again.tokenizer().hash == run.tokenizer().hash


AUTO = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert "torchstone.interop.hf" in sys.modules
with torch.no_grad():
    torch.save(model(torch.arange(24).view(2, 12) * 7 % 250).logits, sys.argv[2])
"""


@pytest.mark.slow
def test_our_own_form_loads_through_auto_map_without_an_import_of_ours(tmp_path: Path) -> None:
    run = train(tiny.recipe(tmp_path, model={"position": "alibi"}), out=tmp_path / "run", quiet=True)
    export_run(run, tmp_path / "out", dtype="fp32")
    made = subprocess.run(
        [sys.executable, "-c", AUTO, str(tmp_path / "out"), str(tmp_path / "logits.pt")],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert made.returncode == 0, made.stderr[-2000:]
    with torch.no_grad():
        ours = run.model()(torch.arange(24).view(2, 12) * 7 % 250).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), ours)


def adapted(tmp_path: Path, source: Path, targets: tuple[str, ...]) -> RunFolder:
    base = import_run(source, tmp_path / "base")
    recipe = {**tiny.recipe(tmp_path, optimizer={"lr": 0.01}), "init_from": str(base.path)}
    del recipe["model"], recipe["data"]["tokenizer"]
    adapt = {"kind": "lora", "rank": 2, "alpha": 5.0, "targets": list(targets)}
    return train({**recipe, "adapt": adapt}, out=tmp_path / "adapted", quiet=True)


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def deepseek() -> Any:
    torch.manual_seed(0)
    config = transformers.DeepseekV2Config(
        vocab_size=300, hidden_size=32, intermediate_size=40, num_hidden_layers=2, first_k_dense_replace=2,
        num_attention_heads=4, max_position_embeddings=64, kv_lora_rank=12, q_lora_rank=10, qk_nope_head_dim=6,
        qk_rope_head_dim=4, v_head_dim=5,
    )  # fmt: skip
    return transformers.DeepseekV2ForCausalLM(config).eval()


# in a model type that may have experts, PEFT takes projections of dense feed-forwards for theirs
@pytest.mark.parametrize(("make", "target"), [(llama, "up"), (gpt2, "up"), (deepseek, "k")])
def test_an_adapter_exported_to_peft_computes_the_same_and_so_does_the_merged_model(
    tmp_path: Path, make: Any, target: str
) -> None:
    peft = pytest.importorskip("peft")
    source = save(tmp_path / "hf", make())
    run = adapted(tmp_path, source, ("q", "v", target, "out"))
    assert export_run(run, tmp_path / "adapter", to="peft") == "peft"
    base = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    ids = torch.randint(300, (2, 9))
    with torch.no_grad():
        plain = base(ids).logits.clone()
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    logits_close(run.model(), model, ids)
    with torch.no_grad():
        assert (model(ids).logits - plain).abs().max() > 1e-3 * plain.abs().max()
    assert export_run(run, tmp_path / "merged") == run_layout(source)
    logits_close(run.model(), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), ids)


def test_an_adapter_that_peft_would_misread_is_refused_and_merges(tmp_path: Path) -> None:
    source = save(tmp_path / "hf", deepseek())
    run = adapted(tmp_path, source, ("up",))
    with pytest.raises(TorchstoneError, match=r"PEFT takes model\.layers\.0\.mlp\.up_proj of a deepseek_v2 model"):
        export_run(run, tmp_path / "adapter", to="peft")
    assert not (tmp_path / "adapter").exists()
    export_run(run, tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    logits_close(run.model(), theirs, torch.randint(300, (2, 9)))


def run_layout(source: Path) -> str:
    return str(json.loads((source / "config.json").read_text())["model_type"])
