"""A run of bitlinear projections, packed: the same tokens from fewer bytes, through export, load and the engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from torchstone import api
from torchstone.errors import TorchstoneError
from torchstone.generate import Engine, Sampling
from torchstone.train.checkpoint import load_tensors


def trained(folder: Path, **model: Any) -> api.Run:
    folder.mkdir(exist_ok=True)
    fields = {"width": 32, "depth": 2, "attention": {"heads": 2}, "linear": {"kind": "bitlinear"}, **model}
    return api.train(tiny.recipe(folder, model=fields, trainer={"steps": 4}), out=folder / "run", quiet=True)


@pytest.mark.parametrize("linear", [{"weights": "ternary"}, {"weights": "binary", "norm": "layernorm", "groups": 2}])
def test_a_packed_run_writes_the_same_tokens_from_fewer_bytes(linear: dict[str, Any], tmp_path: Path) -> None:
    run = trained(tmp_path, linear={"kind": "bitlinear", **linear}, ffn={"kind": "mlp", "bias": True})
    assert run.export(tmp_path / "packed", to="packed") == "packed"
    packed = api.load(tmp_path / "packed")
    ids = torch.randint(200, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(packed.model()(ids).logits, run.model()(ids).logits)
    asked: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.0, "compile": "off"}
    ours, theirs = (each.generate(["ab", "c d"], **asked) for each in (packed, run))
    assert [done.ids for done in ours] == [done.ids for done in theirs]
    held, whole = (load_tensors(each.path / "model.safetensors") for each in (packed, run))
    bits = 2 if linear["weights"] == "ternary" else 1
    for name, tensor in whole.items():
        if name.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight")):
            path = name.removesuffix(".weight")
            assert held[f"{path}.packed"].nbytes * 8 == tensor.numel() * bits
        else:
            assert torch.equal(held[name], tensor)
    counted = api.inspect(run.path)
    assert counted["packed_weight_bytes"] == sum(tensor.nbytes for tensor in held.values())
    assert counted["packed_weight_bytes"] == api.inspect(packed.path)["weight_bytes"]
    assert counted["flops_per_token"] == api.inspect(packed.path)["flops_per_token"]
    assert counted["energy_per_token"] == api.inspect(packed.path)["energy_per_token"]


def test_what_has_no_packed_form_is_refused_and_nothing_written(tmp_path: Path) -> None:
    dense = trained(tmp_path, linear="dense")
    with pytest.raises(TorchstoneError, match="only models trained with linear bitlinear have a packed form"):
        dense.export(tmp_path / "out", to="packed")
    bit = trained(tmp_path / "bit")
    with pytest.raises(TorchstoneError, match="layout"):
        bit.export(tmp_path / "out", to="llama")
    bit.export(tmp_path / "packed", to="packed")
    packed = api.load(tmp_path / "packed")
    with pytest.raises(TorchstoneError, match="the run is packed already"):
        packed.export(tmp_path / "out", to="packed")
    with pytest.raises(TorchstoneError, match="a packed run has no other form"):
        packed.export(tmp_path / "out")
    with pytest.raises(TorchstoneError, match="packed weights do not train"):
        more = {name: part for name, part in tiny.recipe(tmp_path).items() if name != "model"}
        api.train({"init_from": str(packed.path), **more}, out=tmp_path / "more", quiet=True)
    experts = trained(tmp_path / "experts", ffn={"kind": "moe", "experts": 2, "active": 1, "hidden": 8})
    with pytest.raises(TorchstoneError, match="experts have no packed form"):
        experts.export(tmp_path / "out", to="packed")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_packs_and_the_compiled_step_writes_the_same_tokens(tmp_path: Path) -> None:
    run = trained(tmp_path)
    command = [sys.executable, "-m", "torchstone", "export", str(run.path), str(tmp_path / "packed"), "--to", "packed"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().endswith("packed")
    prompts, sampling = [[1, 2, 3]], Sampling(temperature=0.0, max_new_tokens=24)
    eager = Engine(run.model(), compile="off").generate(prompts, sampling)
    compiled = Engine(api.load(tmp_path / "packed").model(), compile="on").generate(prompts, sampling)
    assert [done.ids for done in compiled] == [done.ids for done in eager]
