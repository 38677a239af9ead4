"""Checkpoints: safetensors keyed by parameter name and JSON with checksums; a LATEST pointer is replaced last.

    state/LATEST                      the name of the newest complete checkpoint
    state/step-00000200/state.json    step, format, recipe hash, checksums
    state/step-00000200/*.safetensors model, optimizer, objective, ema

A checkpoint is written into a hidden folder and renamed, so a kill at any moment leaves the last complete one valid.
Every file has a checksum: safetensors carry that of their tensors, so that weights are checked without `state/` too.
Pickle is neither written nor read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from torchstone.errors import TorchstoneError
from torchstone.files import digest, full_disk, read_json, write_bytes, write_json

__all__ = ["Checkpoint", "Checkpoints", "TensorFile", "load_tensors", "save_tensors", "stream_tensors"]

FORMAT = "torchstone.state"


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, their checksum among the metadata. The caller provides atomicity."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(ready, path, metadata={"format": "pt", **(metadata or {}), "sha256": _checksum(ready)})
    except SafetensorError as error:
        if "No space left" in str(error) or "os error 28" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device") from error
        raise


class TensorFile:
    """A safetensors file that is read one tensor at a time: iterating gives (name, tensor), in the order of the names,
    and compares with the file's checksum at the end, if it has one.

    Raises:
        TorchstoneError: missing, truncated, altered, or no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise TorchstoneError(f"{path}: no such file")
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            names = sorted(self._file.keys())
            self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise TorchstoneError(f"{path}: truncated or no safetensors file ({error})") from None

    def get(self, name: str) -> torch.Tensor:
        """One tensor, without a look at the checksum."""
        try:
            return self._file.get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise TorchstoneError(f"{self.path}: truncated or no safetensors file ({error})") from None

    @property
    def dtype(self) -> torch.dtype:
        """Of its first tensor."""
        return self.get(next(iter(self.shapes))).dtype

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        expected, total = (self._file.metadata() or {}).get("sha256"), hashlib.sha256()
        for name in self.shapes:
            tensor = self.get(name)
            if expected is not None:
                _count(total, name, tensor)
            yield name, tensor
        if expected is not None and expected != total.hexdigest():
            raise TorchstoneError(f"{self.path}: altered since it was written (its checksum differs)")


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, on the CPU; see `TensorFile`."""
    return dict(iter(TensorFile(path)))


_CODES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def stream_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    metadata: Mapping[str, str] | None = None,
    kept: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Write tensors as safetensors one at a time, so that never more than one is in memory. The caller provides
    atomicity.

    Args:
        path: the file.
        shapes: of every tensor, before the first is there.
        tensors: (name, tensor) in any order.
        dtype: what they are stored in.
        metadata: strings of the header, beside the checksum.
        kept: by name, what is stored in something else: buffers.
    """
    dtypes = {**dict.fromkeys(shapes, dtype), **(kept or {})}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {}), "sha256": "0" * 64}}
    ends = [0]
    for name in sorted(shapes, key=lambda name: (-dtypes[name].itemsize, name)):  # each at a multiple of its size
        ends.append(ends[-1] + math.prod(shapes[name]) * dtypes[name].itemsize)
        header[name] = {"dtype": _CODES[dtypes[name]], "shape": list(shapes[name]), "data_offsets": ends[-2:]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start, written = 8 + len(text), set()
    with open(path, "wb+") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(start + ends[-1])
        for name, tensor in tensors:
            if tuple(tensor.shape) != tuple(shapes[name]):
                raise ValueError(f"{name} is {tuple(tensor.shape)}, announced as {tuple(shapes[name])}")
            file.seek(start + header[name]["data_offsets"][0])
            file.write(tensor.detach().to("cpu", dtypes[name]).contiguous().reshape(-1).view(torch.uint8).numpy().data)
            written.add(name)
        if written != set(shapes):
            raise ValueError(f"announced and not written: {sorted(set(shapes) - written)}")
        file.flush()
        total = hashlib.sha256()
        with safe_open(path, framework="pt") as made:
            for name in sorted(shapes):
                _count(total, name, made.get_tensor(name))
        file.seek(8)
        file.write(text.replace(b"0" * 64, total.hexdigest().encode(), 1))


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        _count(total, name, tensors[name])
    return total.hexdigest()


def _count(total: Any, name: str, tensor: torch.Tensor) -> None:
    total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
    total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint: tensors by file name, and facts."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    facts: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of its folder."""
        return name_of(self.step)


def name_of(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


class Checkpoints:
    """The `state` folder of a run."""

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        self.folder, self.keep_last = folder, keep_last

    def latest(self) -> str | None:
        """Name of the newest complete checkpoint; None if there is none."""
        pointer = self.folder / "LATEST"
        if not pointer.exists():
            return None
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(r"step-\d{8}", name):
            raise TorchstoneError(f"{pointer}: names no checkpoint (found {name[:40]!r})")
        return name

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], facts: Mapping[str, Any], best: bool = False
    ) -> Path:
        """Write a checkpoint, point LATEST (and BEST) at it, and drop those no longer kept.

        What LATEST names already stays as it is: the state of a step is a function of the recipe alone, and to
        replace it would leave a moment without any.

        Raises:
            TorchstoneError: no space left; what was there stays valid.
        """
        try:
            with full_disk(self.folder):
                return self._save(step, tensors, facts, best)
        except TorchstoneError as error:
            latest = self.latest()
            stays = f"the checkpoint {latest} is good" if latest else "there is no checkpoint yet"
            raise TorchstoneError(f"{error}; {stays}") from error

    def _save(
        self, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], facts: Mapping[str, Any], best: bool
    ) -> Path:
        name = name_of(step)
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(".step-*"):  # left by a kill
            shutil.rmtree(stale, ignore_errors=True)
        work, final = self.folder / f".{name}.{os.getpid()}", self.folder / name
        if self.latest() != name or not final.is_dir():
            self._write(work, final, step, tensors, facts)
            write_bytes(self.folder / "LATEST", name.encode())
        if best:
            write_bytes(self.folder / "BEST", name.encode())
        self._prune()
        return final

    def _write(
        self,
        work: Path,
        final: Path,
        step: int,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        facts: Mapping[str, Any],
    ) -> None:
        try:
            work.mkdir()
            files = {}
            for part, content in tensors.items():
                path = work / f"{part}.safetensors"
                save_tensors(path, content)
                _sync(path)
                files[path.name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
            state = {"format": FORMAT, "step": step, **facts, "files": files}
            write_json(work / "state.json", {**state, "sha256": _checksum_json(state)})
            if final.exists():
                shutil.rmtree(final)
            os.rename(work, final)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise

    def _prune(self) -> None:
        kept = {
            (self.folder / pointer).read_text(errors="replace").strip()
            for pointer in ("LATEST", "BEST")
            if (self.folder / pointer).exists()
        }
        for old in sorted(self.folder.glob("step-*"))[: -self.keep_last]:
            if old.name not in kept:
                shutil.rmtree(old, ignore_errors=True)

    def load(self, name: str | None = None) -> Checkpoint | None:
        """The checkpoint `name` (the newest by default), every file checked against its checksum; None if none.

        Raises:
            TorchstoneError: a file is missing, truncated, altered or foreign; names it.
        """
        name = name or self.latest()
        if name is None:
            return None
        folder = self.folder / name
        if not folder.is_dir():
            raise TorchstoneError(f"{folder}: missing, and {self.folder / 'LATEST'} names it as the newest checkpoint")
        facts = read_json(folder / "state.json")
        if not isinstance(facts, dict) or facts.get("format") != FORMAT or not isinstance(facts.get("files"), dict):
            raise TorchstoneError(f"{folder / 'state.json'}: no torchstone checkpoint")
        if facts.pop("sha256", None) != _checksum_json(facts):
            raise TorchstoneError(f"{folder / 'state.json'}: altered since it was written (its checksum differs)")
        if "model.safetensors" not in facts["files"]:
            raise TorchstoneError(f"{folder / 'state.json'}: lists no model.safetensors")
        tensors = {}
        for file, expected in facts["files"].items():
            path = folder / file
            if not path.is_file():
                raise TorchstoneError(f"{path}: missing from the checkpoint")
            if path.stat().st_size != expected["bytes"]:
                raise TorchstoneError(
                    f"{path}: truncated, {path.stat().st_size} bytes where {expected['bytes']} were written"
                )
            if digest(path) != expected["sha256"]:
                raise TorchstoneError(f"{path}: altered since it was written (its checksum differs)")
            tensors[path.stem] = load_tensors(path)
        return Checkpoint(int(facts["step"]), tensors, facts)


def _checksum_json(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
