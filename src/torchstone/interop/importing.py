"""Import: a published checkpoint becomes a run.

Everything is checked before anything is written, and the run appears at once, under its final name, when it is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchstone.data import Tokenizer
from torchstone.errors import TorchstoneError
from torchstone.files import full_disk, read_json, write_json
from torchstone.interop.layout import Shapes, compare_shapes, find_layout, tensors_of
from torchstone.interop.source import CheckpointFile, CheckpointFolder
from torchstone.model.transformer import TransformerSpec
from torchstone.recipe import Recipe
from torchstone.spec import validate
from torchstone.train.checkpoint import stream_tensors
from torchstone.train.environment import environment
from torchstone.train.run import RunFolder, shape_of

__all__ = ["import_run"]

_OBJECTIVES = {"lm": "causal_lm", "mlm": "masked_lm"}
_OF_IMAGES: dict[str, dict[str, Any]] = {
    "lm": {"kind": "masked_image", "tokenizer": "tokenizer"},
    "classification": {"kind": "classification"},
}


def import_run(
    source: str | Path,
    out: str | Path,
    layout: str | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
) -> RunFolder:
    """Read a checkpoint in a published layout and write it as a run.

    Tensors go from the memory-mapped shards to the run's file one at a time, in the precision that they have. The
    tokenizer's and generation's files come along.

    Args:
        source: a folder in Hugging Face's form (config.json, safetensors), or an id on the hub; or a file of tensors
            that torch.save wrote, with the two below.
        out: the run directory; it must be free.
        layout: the layout of a file of tensors, where its config does not say it in `model_type`.
        config: the config of a file of tensors: values, or a JSON file of them.

    Raises:
        TorchstoneError: an architecture or option without a place here; tensors missing, surplus or mis-shaped, all
            by name; no space. Nothing is written then.
    """
    folder = RunFolder(out)
    given = _given(source, layout, config)
    folder.check_free()
    spec, tensors, dtype = _read(given)
    model = shape_of(spec)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
    tokenizer = _tokenizer(given)
    if tokenizer is not None and spec.vocabulary is not None and tokenizer.vocabulary > spec.vocabulary:
        raise TorchstoneError(
            f"{given.name}: its tokenizer has {tokenizer.vocabulary} ids, its model only {spec.vocabulary}"
        )
    facts = environment(torch.device("cpu"), torch.get_num_threads(), "off", 1)
    facts |= {"imported": {"from": given.name, "model_type": given.config["model_type"]}}
    work = folder.path.with_name(f".{folder.path.name}.{os.getpid()}.import")
    try:
        with full_disk(folder.path):
            work.mkdir(parents=True)
            stream_tensors(work / "model.safetensors", shapes, tensors, dtype, kept=_buffers(model))
        RunFolder(work).begin(_recipe(spec, tokenizer, folder.path), tokenizer, facts)
        names = {name: given.config[name] for name in ("id2label", "label2id") if name in given.config}
        if names and spec.head.kind == "classification":
            write_json(work / "config.json", {**read_json(work / "config.json"), **names})
        with full_disk(folder.path):
            for file in given.companions():
                shutil.copyfile(file, work / file.name)
            os.replace(work, folder.path)  # an empty folder of that name gives way
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return folder


_Given = CheckpointFolder | CheckpointFile


def _given(source: str | Path, layout: str | None, config: str | Path | Mapping[str, Any] | None) -> _Given:
    if layout is None and config is None:
        return CheckpointFolder.find(source)
    if not Path(source).is_file():
        raise TorchstoneError(f"{source}: a layout or a config goes with a file of tensors, and this is no file")
    if not isinstance(config, Mapping):
        config = {} if config is None else read_json(Path(config))
    if not isinstance(config, Mapping):
        raise TorchstoneError(f"{source}: its config needs a mapping, got {config!r:.60}")
    return CheckpointFile(source, config if layout is None else {**config, "model_type": layout})


_Read = tuple[TransformerSpec, Iterable[tuple[str, torch.Tensor]], torch.dtype]


def _read(given: _Given) -> _Read:
    """The spec, our tensors one at a time, and the precision of parameters; all refusals come here."""
    shapes: Shapes = given.shapes
    if given.config["model_type"] == "torchstone":
        return _own(given)
    layout = find_layout(given.config["model_type"])
    spec = validate(TransformerSpec, layout.to_spec(given.config, shapes), given.name)
    buffers = _buffers(shape_of(spec))
    apart = {name for step in layout.steps(spec) if step.ours in buffers for name in step.theirs}
    return spec, layout.read(spec, shapes, given.get), given.dtype(apart)


def _own(given: _Given) -> _Read:
    """A checkpoint of our own, which `export` wrote."""
    spec = RunFolder(given.path).model_spec
    if not isinstance(spec, TransformerSpec):
        raise TorchstoneError(f"{given.name}: model {spec.kind} cannot be imported")
    model = shape_of(spec)
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
    compare_shapes(given.name, wanted, given.shapes)
    return spec, ((name, given.get(name)) for name in wanted), given.dtype(_buffers(model))


def _buffers(model: nn.Module) -> dict[str, torch.dtype]:
    """What a model keeps besides parameters, and in which precision."""
    return {name: buffer.dtype for name, buffer in model.named_buffers()}


def _tokenizer(given: _Given) -> Tokenizer | None:
    """The checkpoint's tokenizer; one in a form of earlier times is converted by transformers."""
    if (given.path / "tokenizer.json").is_file():
        return Tokenizer.load(given.path)
    if not given.needs_conversion():
        return None
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise TorchstoneError(
            f"{given.name}: its tokenizer has no tokenizer.json; to convert it needs the extra `hf`: "
            "pip install 'torchstone[hf]'"
        ) from None
    try:
        fast = AutoTokenizer.from_pretrained(given.path)
        names = {name: str(token) for name, token in fast.special_tokens_map.items() if isinstance(token, str)}
        return Tokenizer(fast.backend_tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    except Exception as error:  # converters raise whatever their libraries do
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise TorchstoneError(f"{given.name}: its tokenizer cannot be converted ({reason})") from None


def _recipe(spec: TransformerSpec, tokenizer: Tokenizer | None, path: Path) -> Recipe:
    """A recipe that goes on with this model: its tokenizer, its objective, blocks of its context. Of images it says
    where the user's are to lie."""
    if spec.embedding.kind == "patch":
        images = {"kind": "images", "path": "images", "labels": spec.head.kind == "classification"}
        return validate(Recipe, {"model": spec.dump(), "data": images, "objective": _OF_IMAGES[spec.head.kind]})
    data: dict[str, Any] = {"kind": "text", "block": min(spec.context or 1024, 1024)}
    if tokenizer is not None:
        data["tokenizer"] = {"kind": "file", "path": str(path)}
    objective = {"kind": _OBJECTIVES.get(spec.head.kind, "causal_lm")}
    return validate(Recipe, {"model": spec.dump(), "data": data, "objective": objective})
