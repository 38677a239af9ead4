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
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from torchstone.errors import TorchstoneError
from torchstone.files import digest, full_disk, read_json, write_bytes, write_json

__all__ = ["Checkpoint", "Checkpoints", "load_tensors", "save_tensors"]

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


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, on the CPU, compared with the file's checksum if it has one.

    Raises:
        TorchstoneError: missing, truncated, altered, or no safetensors file.
    """
    if not path.is_file():
        raise TorchstoneError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            expected = (file.metadata() or {}).get("sha256")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise TorchstoneError(f"{path}: truncated or no safetensors file ({error})") from None
    if expected is not None and expected != _checksum(tensors):
        raise TorchstoneError(f"{path}: altered since it was written (its checksum differs)")
    return tensors


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


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
