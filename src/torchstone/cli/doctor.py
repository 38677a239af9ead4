"""What is on this machine and what is missing for which extra."""

from __future__ import annotations

import importlib.util
import platform
import sys
from importlib import metadata
from typing import Any

import torch

from torchstone.ops.compiler import compiler_works
from torchstone.train.environment import choose_threads

__all__ = ["examine"]

_MODULES = {"faiss-cpu": "faiss", "lm-eval": "lm_eval", "scikit-learn": "sklearn", "pyyaml": "yaml"}


def examine() -> dict[str, Any]:
    """Versions, devices, threads, compiler, extras."""
    versions = {name: metadata.version(name) for name in ("torch", "numpy", "pydantic", "safetensors", "tokenizers")}
    cuda = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    devices = {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cuda": ", ".join(cuda) or "none",
        "mps": "yes" if torch.backends.mps.is_available() else "none",
    }
    return {
        "torchstone": metadata.version("torchstone"),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "versions": versions,
        "devices": devices,
        "threads": choose_threads(None),
        "compiler": compiler_works() or "works",
        "extras": _extras(),
    }


def _extras() -> dict[str, str]:
    """By extra: "complete", or what is missing and the line that installs it."""
    needs: dict[str, list[str]] = {}
    for requirement in metadata.requires("torchstone") or []:
        package, _, marker = requirement.partition(";")
        if "extra ==" in marker:
            extra = marker.split("extra ==")[1].strip().strip("'\"")
            name = package.split("[")[0].split(">")[0].split("=")[0].strip().lower()
            if extra not in ("test", "all") and name != "torchstone":
                needs.setdefault(extra, []).append(name)
    report = {}
    for extra, names in sorted(needs.items()):
        missing = [n for n in names if importlib.util.find_spec(_MODULES.get(n, n.replace("-", "_"))) is None]
        report[extra] = f"missing {', '.join(missing)}: pip install 'torchstone[{extra}]'" if missing else "complete"
    return report
