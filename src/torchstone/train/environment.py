"""Where a run runs: devices, threads, versions; and what of it decides whether a resumed run is bitwise the same."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any, Literal

import torch

from torchstone.errors import TorchstoneError
from torchstone.recipe import TrainerSpec

__all__ = ["BITWISE", "autocast", "choose_device", "choose_precision", "choose_threads", "environment"]

BITWISE = ("device", "threads", "torch", "compile", "cpu", "ranks")
"""Entries of the environment that must agree for losses to agree bit for bit."""


def choose_device(name: str) -> torch.device:
    """The device of a recipe.

    Raises:
        TorchstoneError: it is not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise TorchstoneError(f"trainer.device: {name} asked, and torch finds no CUDA device here; use cpu or auto")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise TorchstoneError(f"trainer.device: {name} asked, there are {torch.cuda.device_count()} CUDA devices")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise TorchstoneError("trainer.device: mps asked, and torch finds no MPS device here; use cpu or auto")
    return device


def choose_threads(threads: int | None) -> int:
    """CPU threads of a recipe, else OMP_NUM_THREADS, else as many as the process may use."""
    if threads is not None:
        return threads
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_precision(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> Literal["fp32", "bf16"]:
    """The recipe's precision; "auto" is bf16 where the device has instructions for it."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"


def autocast(device: torch.device, spec: TrainerSpec) -> torch.autocast:
    """Matrix products in bf16 where the recipe asks for it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=spec.precision == "bf16")


def environment(device: torch.device, threads: int, compiled: str, ranks: int) -> dict[str, Any]:
    """Facts of this process and machine, for ``environment.json``."""
    versions = {}
    for name in ("torchstone", "torch", "numpy", "pydantic", "safetensors", "tokenizers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": threads,
        "ranks": ranks,
        "compile": compiled,
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "versions": versions,
    }
