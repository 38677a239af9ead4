"""Export: a run becomes a checkpoint that other libraries read, or a run that is packed.

    export_run(run, "out", to="hf")      # a published layout where one fits, else our own with `auto_map`
    export_run(run, "out", to="qwen3")   # that layout or an error
    export_run(run, "out", to="peft")    # the low-rank updates of an adapted run, as PEFT stores them
    export_run(run, "out", to="packed")  # a run whose bitlinear projections take 1 or 2 bits a weight

Tensors go from file to file one at a time. A LoRA that is not exported as such is merged into the weights.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from torchstone.errors import TorchstoneError, nearest
from torchstone.files import full_disk, read_json, write_json
from torchstone.interop.layout import Layout, find_layout, layouts, tensors_of
from torchstone.interop.packing import packed_spec, write_packed
from torchstone.interop.peft import adapter
from torchstone.interop.source import COMPANIONS, PIXELS
from torchstone.model.linear.bitlinear import PackedBitLinear
from torchstone.model.linear.lora import LoraLinear
from torchstone.model.transformer import TransformerSpec
from torchstone.spec import validate
from torchstone.train.checkpoint import TensorFile, stream_tensors
from torchstone.train.run import RunFolder, config_of, shape_of

__all__ = ["DTYPES", "export_run", "fitting_layout"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SHARD = 5 * 10**9
"""Bytes of a file of weights, as the hub's own tools cut them."""
_COMMON = ("llama", "gpt2", "bert", "t5")
"""Layouts that are tried before the others: those that most tools read."""
_AUTO = "modeling_torchstone"
_CODE = '''"""Makes this checkpoint loadable by its Auto class; needs `pip install torchstone`."""

from torchstone.interop.hf import {names}

__all__ = [{quoted}]
'''


def export_run(run: RunFolder, out: str | Path, to: str = "hf", dtype: str | None = None) -> str:
    """Write a run in another library's form.

    Args:
        run: with weights.
        out: a folder that is not there, or empty.
        to: "hf", a published layout by its model_type, "torchstone" (our own form with `auto_map`), "peft" or
            "packed".
        dtype: fp32, bf16 or fp16; None keeps that of the run's file.

    Returns:
        what was written: the layout's name.

    Raises:
        TorchstoneError: no layout of that name, or it has no place for this model; `out` holds files. Nothing is
            written then.
    """
    run.require()
    allowed = ("hf", "torchstone", "peft", "packed", *layouts())
    if to not in allowed:
        raise TorchstoneError(f"export: no form {to!r}{nearest(to, allowed)}; forms: {', '.join(allowed)}")
    if dtype is not None and dtype not in DTYPES:
        raise TorchstoneError(f"export: dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
    target = Path(out)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise TorchstoneError(f"{target}: holds files already; choose another folder")
    spec = run.model_spec
    if not isinstance(spec, TransformerSpec):
        raise TorchstoneError(f"export: model {spec.kind} has no form in other libraries")
    path = run.path / "model.safetensors"
    if not path.is_file():
        raise TorchstoneError(f"{run.path}: no weights yet")
    file = TensorFile(path)
    for _ in file:  # compares with the checksum before anything is written
        pass
    kept = file.dtype if dtype is None else DTYPES[dtype]
    plain, get = _merged(spec, file)
    layout = None if to in ("torchstone", "peft", "packed") else _layout(run, plain, to)
    is_packed = any(isinstance(module, PackedBitLinear) for module in shape_of(spec).modules())
    if is_packed and layout is None and to != "packed":
        raise TorchstoneError(
            "export: a packed run has no other form than the layout bitnet, where that has a place for it; export the "
            "run that it was packed from"
        )
    if to == "packed":
        packed = packed_spec(spec)
        write = lambda work: write_packed(work, run, packed, file, kept)  # noqa: E731
    elif to == "peft":
        body, tensors = adapter(run, spec, file, _base_layout(run, plain))
        write = lambda work: _write_adapter(work, body, tensors, kept)  # noqa: E731
    elif layout is None:
        write = lambda work: _write_own(work, run, plain, get, kept)  # noqa: E731
    else:
        config = layout.to_config(plain)
        for name, wanted in _special(run).items():
            if config.get(name) not in (None, wanted):
                raise TorchstoneError(
                    f"the {layout.model_type} layout has no place for {name} {wanted}; it takes {config[name]}"
                )
        write = lambda work: _write_layout(work, run, layout, plain, config, get, kept)  # noqa: E731
    work = target.with_name(f".{target.name}.{os.getpid()}.export")
    try:
        with full_disk(target):
            work.mkdir(parents=True)
            write(work)
            os.replace(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return to if to in ("peft", "packed") else "torchstone" if layout is None else layout.model_type


def fitting_layout(spec: TransformerSpec, first: str | None = None) -> Layout | None:
    """The published layout that has a place for everything in `spec`, `first` before the others; None if none has."""
    names = layouts()
    order = dict.fromkeys([first, *_COMMON, *names])
    for name in (name for name in order if name in names):
        layout = find_layout(str(name))
        if not layout.hub:
            continue
        try:
            layout.to_config(spec)
        except TorchstoneError:
            continue
        return layout
    return None


def _layout(run: RunFolder, spec: TransformerSpec, to: str) -> Layout | None:
    if to != "hf":
        return find_layout(to)
    return fitting_layout(spec, _imported(run))


def _base_layout(run: RunFolder, spec: TransformerSpec) -> Layout | None:
    return fitting_layout(spec, _imported(run))


def _imported(run: RunFolder) -> str | None:
    """The layout that the run, or the run it was adapted from, came in."""
    for folder in (run, RunFolder(run.recipe.init_from or run.path)):
        path = folder.path / "environment.json"
        facts = read_json(path) if path.is_file() else {}
        if isinstance(found := (facts.get("imported") or {}).get("model_type"), str):
            return found.replace("-", "_")
    return None


def _merged(spec: TransformerSpec, file: TensorFile) -> tuple[TransformerSpec, Callable[[str], torch.Tensor]]:
    """The spec without LoRA, and its parameters by name: the updates added to what they update."""

    def dense(body: Any) -> Any:
        if isinstance(body, Mapping):
            linear = body.get("linear")
            base = {"linear": linear["base"]} if isinstance(linear, Mapping) and linear.get("kind") == "lora" else {}
            return {name: dense(value) for name, value in {**body, **base}.items()}
        return [dense(value) for value in body] if isinstance(body, list | tuple) else body

    model = shape_of(spec)
    adapted = {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}
    if not adapted:
        return spec, file.get
    body = {name: value for name, value in dense(spec.dump()).items() if name != "kind"}
    plain = validate(TransformerSpec, body)
    kinds = {module.spec.base.kind for module in adapted.values()}
    if kinds != {"dense"}:
        raise TorchstoneError(f"export: a LoRA on linear {min(kinds - {'dense'})} cannot be merged; it is not linear")

    def get(name: str) -> torch.Tensor:
        path, _, last = name.rpartition(".")
        if path not in adapted or last != "weight":
            return file.get(name)
        module = adapted[path]
        own = {part: file.get(f"{path}.{part}").float() for part, _ in module.named_parameters(recurse=False)}
        module.load_state_dict(own, assign=True)
        merged = module.merged().detach()
        module.to("meta")
        return merged

    return plain, get


# ---------------------------------------------------------------------------------------------------------- writing


def _write_layout(
    work: Path,
    run: RunFolder,
    layout: Layout,
    spec: TransformerSpec,
    config: dict[str, Any],
    get: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
) -> None:
    model = shape_of(spec)
    shapes = {name: tuple(tensor.shape) for name, tensor in layout.write(spec, tensors_of(model).__getitem__)}
    buffers = {name: buffer.dtype for name, buffer in model.named_buffers()}
    kept = {their: buffers[step.ours] for step in layout.steps(spec) if step.ours in buffers for their in step.theirs}
    _write_tensors(work, shapes, layout.write(spec, get), dtype, kept)
    name = str(dtype).removeprefix("torch.")
    if "image_mean" in config:
        write_json(work / PIXELS, _pixels(config))
        config = {key: value for key, value in config.items() if key not in ("image_mean", "image_std")}
    labels = {key: value for key, value in run.config.items() if key in ("id2label", "label2id") and key in config}
    write_json(work / "config.json", {**config, **labels, **_special(run), "dtype": name})
    _copy_companions(work, run)


def _pixels(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers makes of a picture before the model sees it, from the config of one."""
    side, channels = config["image_size"], config["num_channels"]
    scales = {key: (config[key] * channels)[:channels] for key in ("image_mean", "image_std")}
    steps = {"do_resize": True, "do_center_crop": False, "do_rescale": True, "do_normalize": True}
    name = f"{config['model_type'].title()}ImageProcessor"
    return {"image_processor_type": name, "size": {"height": side, "width": side}, **steps, **scales}


def _write_own(
    work: Path, run: RunFolder, spec: TransformerSpec, get: Callable[[str], torch.Tensor], dtype: torch.dtype
) -> None:
    model = shape_of(spec)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
    buffers = {name: buffer.dtype for name, buffer in model.named_buffers()}
    _write_tensors(work, shapes, ((name, get(name)) for name in shapes), dtype, buffers)
    config = config_of(spec, None) | _special(run)
    head = config["architectures"][0]
    auto = f"AutoModel{head.removeprefix('Torchstone')}" if head != "TorchstoneModel" else "AutoModel"
    names = ["TorchstoneConfig", head]
    config["auto_map"] = {"AutoConfig": f"{_AUTO}.TorchstoneConfig", auto: f"{_AUTO}.{head}"}
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_json(work / "config.json", config)
    code = _CODE.format(names=", ".join(names), quoted=", ".join(f'"{name}"' for name in names))
    (work / f"{_AUTO}.py").write_text(code, encoding="utf-8")
    _copy_companions(work, run)


def _write_adapter(work: Path, body: dict[str, Any], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    stream_tensors(work / "adapter_model.safetensors", shapes, tensors.items(), dtype)
    write_json(work / "adapter_config.json", body)


def _write_tensors(
    work: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterator[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    kept: Mapping[str, torch.dtype],
) -> None:
    """One file, or shards with an index. `kept`: what is not stored in `dtype`."""
    size = {name: torch.Size(shape).numel() * kept.get(name, dtype).itemsize for name, shape in shapes.items()}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = _SHARD
    for name, shape in shapes.items():
        if size[name] > room and shards[-1]:
            shards.append({})
            room = _SHARD
        shards[-1][name] = shape
        room -= size[name]
    if len(shards) == 1:
        stream_tensors(work / "model.safetensors", shapes, tensors, dtype, kept=kept)
        return
    table: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        own = {name: kept[name] for name in shard if name in kept}
        stream_tensors(work / file, shard, (next(tensors) for _ in shard), dtype, kept=own)
        table |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(size.values())}, "weight_map": table}
    (work / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _special(run: RunFolder) -> dict[str, Any]:
    """Ids of the special tokens, as the run's generation settings have them."""
    path = run.path / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    return {name: settings[name] for name in names if settings.get(name) is not None}


def _copy_companions(work: Path, run: RunFolder) -> None:
    for name in COMPANIONS:
        if (run.path / name).is_file():
            shutil.copyfile(run.path / name, work / name)
