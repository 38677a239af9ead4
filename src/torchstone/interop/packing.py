"""Packing: a run whose projections are `bitlinear` becomes a run that holds them in 1 or 2 bits a weight.

    export_run(run, "out", to="packed")

What comes out is a run directory like any other: it generates, is evaluated and inspected, and in float32 its scores
are those of the first to the bit. It does not train. What is no such projection keeps its form.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from torchstone.errors import TorchstoneError
from torchstone.model import ModelSpec
from torchstone.model.linear.bitlinear import PackedBitLinear
from torchstone.spec import validate
from torchstone.train.checkpoint import TensorFile, save_tensors
from torchstone.train.environment import environment
from torchstone.train.run import RunFolder, shape_of

__all__ = ["packed_spec", "write_packed"]


def packed_spec(spec: ModelSpec) -> ModelSpec:
    """The same model, its bitlinear projections packed.

    Raises:
        TorchstoneError: it has none, they are packed already, or are those of experts.
    """

    def packed(body: Any) -> Any:
        if isinstance(body, Mapping):
            made = {name: packed(value) for name, value in body.items()}
            if isinstance(linear := made.get("linear"), Mapping) and linear.get("kind") == "bitlinear":
                found.append(bool(linear.get("packed")))
                made["linear"] = {**linear, "packed": True}
            return made
        return [packed(value) for value in body] if isinstance(body, list | tuple) else body

    found: list[bool] = []
    body = {name: value for name, value in packed(spec.dump()).items() if name != "kind"}
    if not found:
        raise TorchstoneError("export: only models trained with linear bitlinear have a packed form")
    if any(found):
        raise TorchstoneError("export: the run is packed already")
    return validate(type(spec), body)


def write_packed(work: Path, run: RunFolder, spec: ModelSpec, file: TensorFile, dtype: torch.dtype) -> None:
    """Write the packed run into a folder that is there; `spec` is `packed_spec` of the run's, `dtype` that of all that
    is not packed."""
    model = shape_of(spec)
    places = {path: module for path, module in model.named_modules() if isinstance(module, PackedBitLinear)}
    tensors: dict[str, torch.Tensor] = {}
    for path, module in places.items():
        tensors |= {f"{path}.{name}": held for name, held in module.of(file.get(f"{path}.weight")).items()}
    for name, wanted in model.state_dict().items():
        if name not in tensors:
            tensors[name] = file.get(name).to(dtype) if wanted.is_floating_point() else file.get(name)
    tokenizer = run.tokenizer() if (run.path / "tokenizer.json").is_file() else None
    facts = environment(torch.device("cpu"), torch.get_num_threads(), "off", 1)
    RunFolder(work).begin(run.recipe.override({"model": spec.dump()}), tokenizer, facts)
    save_tensors(work / "model.safetensors", tensors)
