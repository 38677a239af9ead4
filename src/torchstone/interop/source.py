"""A published checkpoint as it lies on disk: its config, the shapes in the headers of its shards, tensors by name.

    source = CheckpointFolder.find("meta-llama/Llama-3.2-1B")
    source.config, source.shapes, source.get("model.norm.weight")

Tensors are read from memory-mapped files when they are asked for, one at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Container, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from torchstone.errors import TorchstoneError
from torchstone.files import read_json

__all__ = ["COMPANIONS", "PIXELS", "CheckpointFile", "CheckpointFolder"]

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files beside the weights that go along as they are."""

PIXELS = "preprocessor_config.json"
"""How pixels are scaled: a part of the model here."""

_SLOW_TOKENIZERS = (
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_READ = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
"""Weights, and what buffers may hold."""
_SCALES = "_scale_inv"
"""Ending of the scales of a matrix that is quantised by blocks."""


class CheckpointFolder:
    """The files of a checkpoint in Hugging Face's form.

    Args:
        path: the folder; `name` is how a user calls it.

    Raises:
        TorchstoneError: no config.json, no safetensors, a shard that is missing or damaged.
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path = Path(path)
        self.name = str(path) if name is None else name
        if not (self.path / "config.json").is_file():
            raise TorchstoneError(f"{self.name}: no checkpoint (it has no config.json)")
        config = read_json(self.path / "config.json")
        if not isinstance(config, Mapping) or not isinstance(config.get("model_type"), str):
            raise TorchstoneError(f"{self.path / 'config.json'}: names no model_type")
        self.config: dict[str, Any] = dict(config)
        if (self.path / PIXELS).is_file():
            pixels = read_json(self.path / PIXELS)
            self.config |= {name: pixels[name] for name in ("image_mean", "image_std") if pixels.get(name)}

    @classmethod
    def find(cls, source: str | Path) -> CheckpointFolder:
        """The checkpoint in a folder, or of a Hugging Face id, which is downloaded if it is not in the cache.

        Raises:
            TorchstoneError: neither; or the hub cannot be reached.
        """
        folder = Path(os.path.expanduser(source))
        if folder.is_dir():
            return cls(folder)
        name = str(source)
        if folder.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
            raise TorchstoneError(f"{name}: no such folder")
        try:
            from huggingface_hub import snapshot_download
        except ImportError:
            raise TorchstoneError(
                f"{name}: no such folder; as an id on the hub it needs the extra `hf`: pip install 'torchstone[hf]'"
            ) from None
        patterns = ["config.json", "*.safetensors", "*.safetensors.index.json", *COMPANIONS, *_SLOW_TOKENIZERS]
        try:
            return cls(snapshot_download(name, allow_patterns=patterns), name)
        except TorchstoneError:
            raise
        except Exception as error:  # the library raises its own, its HTTP client's and OSErrors
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise TorchstoneError(
                f"{name}: no such folder, and no such checkpoint on the hub ({reason[:200]})"
            ) from None

    @cached_property
    def _files(self) -> dict[str, Path]:
        """The file of each tensor."""
        index, single = self.path / "model.safetensors.index.json", self.path / "model.safetensors"
        if index.is_file():
            table = read_json(index)
            files = table.get("weight_map") if isinstance(table, Mapping) else None
            if not isinstance(files, Mapping) or not all(isinstance(file, str) for file in files.values()):
                raise TorchstoneError(f"{index}: has no weight_map from tensors to files")
            missing = sorted({file for file in files.values() if not (self.path / file).is_file()})
            if missing:
                raise TorchstoneError(f"{self.name}: lacks {', '.join(missing)}, which its index names")
            return {name: self.path / file for name, file in files.items()}
        if single.is_file():
            return dict.fromkeys(self._open(single).keys(), single)
        pickled = sorted(file.name for file in self.path.glob("*.bin"))
        found = f"; there is {pickled[0]}, but pickle is not read: save it as safetensors first" if pickled else ""
        raise TorchstoneError(f"{self.name}: has no model.safetensors{found}")

    @cached_property
    def _opened(self) -> dict[Path, Any]:
        return {}

    def _open(self, file: Path) -> Any:
        if file not in self._opened:
            try:
                self._opened[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError, ValueError) as error:
                raise TorchstoneError(f"{file}: truncated or no safetensors file ({error})") from None
        return self._opened[file]

    def _slice(self, name: str) -> Any:
        file = self._files[name]
        try:
            return self._open(file).get_slice(name)
        except SafetensorError:
            raise TorchstoneError(f"{file}: lacks {name}, which the index puts there") from None

    @cached_property
    def _block(self) -> tuple[int, int] | None:
        """Rows and columns of a block with one scale, where matrices have floats of 8 bits; None where none has.

        Raises:
            TorchstoneError: they have no blocks.
        """
        given = self.config.get("quantization_config")
        if not isinstance(given, Mapping) or given.get("quant_method") != "fp8":
            return None
        block = given.get("weight_block_size")
        if isinstance(block, list) and len(block) == 2 and all(block):
            return block[0], block[1]
        raise TorchstoneError(
            f"{self.name}: its weights have 8 bits (quantization_config) without a weight_block_size of two numbers, "
            "as DeepSeek-V3's have; they cannot be read"
        )

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, from the headers alone; scales of quantised ones are none of their own."""
        names = [name for name in self._files if self._block is None or not name.endswith(_SCALES)]
        return {name: tuple(self._slice(name).get_shape()) for name in names}

    def get(self, name: str) -> torch.Tensor:
        """A tensor, read now, and in float32 if it was quantised.

        Raises:
            TorchstoneError: it is quantised in another way than by blocks, or lacks its scales.
        """
        tensor = self._tensor(name)
        if tensor.dtype is torch.float8_e4m3fn and self._block is not None and f"{name}{_SCALES}" in self._files:
            scales, (rows, columns) = self._tensor(f"{name}{_SCALES}"), self._block
            wanted = (math.ceil(tensor.shape[0] / rows), math.ceil(tensor.shape[1] / columns))
            if scales.shape != wanted:
                raise TorchstoneError(f"{self.name}: {name}{_SCALES} is {tuple(scales.shape)}, not {wanted}")
            scales = scales.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            return tensor.float() * scales[: tensor.shape[0], : tensor.shape[1]]
        if tensor.dtype not in _READ:
            raise TorchstoneError(
                f"{self.name}: {name} is {str(tensor.dtype).removeprefix('torch.')}; quantised weights cannot be read"
            )
        return tensor

    def _tensor(self, name: str) -> torch.Tensor:
        self._slice(name)
        tensor: torch.Tensor = self._open(self._files[name]).get_tensor(name)
        return tensor

    def dtype(self, apart: Container[str] = ()) -> torch.dtype:
        """The precision of the weights: the widest that occurs, among all but those `apart`. What is quantised is as
        precise as what is not."""
        code = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        found = {self._slice(name).get_dtype() for name in self.shapes if name not in apart}
        return next((dtype for name, dtype in code.items() if name in found), torch.float32)

    def companions(self) -> list[Path]:
        """The tokenizer's and generation's files that are there."""
        return [self.path / name for name in COMPANIONS if (self.path / name).is_file()]

    def needs_conversion(self) -> bool:
        """Whether the only tokenizer is in a form of earlier times."""
        there = [name for name in _SLOW_TOKENIZERS if (self.path / name).is_file()]
        return bool(there) and not (self.path / "tokenizer.json").is_file()


class CheckpointFile:
    """A file of tensors that torch.save wrote, and the config that its user has of it.

    The tensors may lie one level down, under "model" (fairseq) or "state_dict". Only tensors and plain data are
    unpickled, whatever the file holds.

    Args:
        path: the file.
        config: its config, with `model_type`.

    Raises:
        TorchstoneError: no such file, no model_type, or something else than tensors in it.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any]) -> None:
        self.path, self.name, self.config = Path(path), str(path), dict(config)
        if not isinstance(self.config.get("model_type"), str):
            raise TorchstoneError(f"{path}: its config names no model_type; say which layout it has")
        try:
            held = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # unpicklers raise whatever the bytes make them do
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
            raise TorchstoneError(f"{path}: cannot be read as tensors alone ({reason})") from None
        inner = (held.get(key) for key in ("model", "state_dict")) if isinstance(held, Mapping) else ()
        held = next((found for found in inner if isinstance(found, Mapping)), held)
        if not isinstance(held, Mapping) or not held:
            raise TorchstoneError(f"{path}: holds no tensors by name")
        wrong = next((name for name, value in held.items() if not isinstance(value, torch.Tensor)), None)
        if wrong is not None:
            raise TorchstoneError(f"{path}: holds {wrong!r}, which is no tensor; save the state dict alone")
        self._tensors: dict[str, torch.Tensor] = dict(held)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def get(self, name: str) -> torch.Tensor:
        """A tensor.

        Raises:
            TorchstoneError: it is quantised.
        """
        tensor = self._tensors[name]
        if tensor.dtype not in _READ:
            raise TorchstoneError(
                f"{self.name}: {name} is {str(tensor.dtype).removeprefix('torch.')}; quantised weights cannot be read"
            )
        return tensor

    def dtype(self, apart: Container[str] = ()) -> torch.dtype:
        """The widest precision of weights that occurs, among all but those `apart`."""
        found = {tensor.dtype for name, tensor in self._tensors.items() if name not in apart}
        return next((dtype for dtype in _READ[:4] if dtype in found), torch.float32)

    def companions(self) -> list[Path]:
        """No files go along."""
        return []

    def needs_conversion(self) -> bool:
        """It has no tokenizer."""
        return False
