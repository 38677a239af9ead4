"""BitNet b1.58 in both forms of its files, weights in full precision and packed, each read by `transformers` too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchstone.errors import TorchstoneError
from torchstone.interop.exporting import export_run
from torchstone.interop.importing import import_run
from torchstone.keys import Key
from torchstone.train.checkpoint import TensorFile

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
IDS = torch.randint(61, (3, 11), generator=Key(3).generator())


@pytest.fixture(autouse=True)
def nothing_is_compiled() -> Iterator[None]:
    """Theirs compiles what unpacks."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def checkpoint(folder: Path, **changes: Any) -> Any:
    """A model of three layers as transformers writes it; gives what transformers reads there."""
    values = {"num_key_value_heads": 2, "intermediate_size": 52, "rms_norm_eps": 3e-5, **changes}
    config = transformers.BitNetConfig(
        vocab_size=61, hidden_size=40, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=None, **values,
    )  # fmt: skip
    model, generator = transformers.BitNetForCausalLM(config), Key(1).generator()
    with torch.no_grad():
        for tensor in model.parameters():
            drawn = 0.3 * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(drawn if tensor.dim() > 1 else 1.0 + drawn)
    model.save_pretrained(folder)
    edit(folder, quantization_config=ONLINE)
    return theirs(folder)


def edit(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def theirs(folder: Path) -> Any:
    return transformers.BitNetForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(IDS).logits
    return found


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 4}], ids=["grouped", "tied"]
)
def test_weights_in_full_precision_and_packed_ones_give_what_transformers_gives(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    wanted = logits(checkpoint(tmp_path / "hf", **changes))
    run = import_run(tmp_path / "hf", tmp_path / "run")
    assert apart(logits(run.model()), wanted) < 1e-5
    # the same tensors go out again
    assert export_run(run, tmp_path / "out", to="hf") == "bitnet"
    before, after = (load_file(tmp_path / where / "model.safetensors") for where in ("hf", "out"))
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    # packed, and read by transformers from the packed bytes
    export_run(run, tmp_path / "packed", to="packed")
    packed = type(run)(tmp_path / "packed")
    assert export_run(packed, tmp_path / "offline", to="hf") == "bitnet"
    stored = load_file(tmp_path / "offline" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    assert stored["model.layers.0.mlp.up_proj.weight"].shape == (13, 40)
    assert apart(logits(theirs(tmp_path / "offline")), wanted) < 1e-5
    again = import_run(tmp_path / "offline", tmp_path / "again")
    first, second = (dict(TensorFile(folder.path / "model.safetensors")) for folder in (packed, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(logits(again.model()), logits(run.model()))


def test_bytes_that_transformers_packed_mean_the_same_here(tmp_path: Path) -> None:
    from transformers.integrations.bitnet import pack_weights

    checkpoint(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    for name, weight in list(tensors.items()):
        if name.endswith("_proj.weight"):
            beta = weight.abs().mean()
            tensors[name] = pack_weights((weight / beta).round().clamp(-1, 1))
            tensors[f"{name}_scale"] = beta.reshape(1)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    edit(tmp_path / "hf", quantization_config={**ONLINE, "quantization_mode": "offline"})
    run = import_run(tmp_path / "hf", tmp_path / "run")
    assert run.model_spec.linear.packed  # type: ignore[attr-defined]
    assert apart(logits(run.model()), logits(theirs(tmp_path / "hf"))) < 1e-5


def test_what_cannot_be_read_or_written_is_refused_in_a_sentence(tmp_path: Path) -> None:
    checkpoint(tmp_path / "hf")
    for change, match in (
        ({"linear_class": "bitlinear"}, "linear_class 'bitlinear' is not supported .*; supported: autobitlinear"),
        ({"use_rms_norm": True}, "use_rms_norm True is not supported"),
        ({"quant_method": "awq"}, "weights quantised by 'awq'"),
        ({"quantization_mode": "offline"}, r"missing .*weight_scale.*has shape \(40, 40\), not \(10, 40\)"),
    ):
        edit(tmp_path / "hf", quantization_config={**ONLINE, **change})
        with pytest.raises(TorchstoneError, match=match):
            import_run(tmp_path / "hf", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sizes_that_do_not_fill_bytes_have_no_packed_layout(tmp_path: Path) -> None:
    checkpoint(tmp_path / "hf", intermediate_size=54)
    run = import_run(tmp_path / "hf", tmp_path / "run")
    export_run(run, tmp_path / "packed", to="packed")
    with pytest.raises(
        TorchstoneError, match="packed matrices whose inputs or outputs 4 does not divide: 40, 54, 40, 20"
    ):
        export_run(type(run)(tmp_path / "packed"), tmp_path / "out", to="bitnet")
    assert not (tmp_path / "out").exists()
