"""Runs that the tests of the Hugging Face classes share, each trained once in a process."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch

import tiny
import torchstone
from torchstone.train.run import RunFolder

WIDE: dict[str, Any] = {"width": 32, "depth": 2, "context": 64, "residual": {"kind": "pre", "std": 0.3}}
"""First values large enough that rounding decides no token."""

MODELS: dict[str, dict[str, Any]] = {
    "grouped-rotary": {**WIDE, "attention": {"heads": 4, "kv_heads": 2}},
    "window": {**WIDE, "attention": {"heads": 4, "window": 4}},
    "window-in-one-layer": {**WIDE, "attention": {"heads": 4}, "layers": [{"at": [0], "attention": {"window": 4}}]},
    "alibi": {**WIDE, "attention": {"heads": 4}, "position": "alibi"},
    "t5": {**WIDE, "attention": {"heads": 4}, "position": {"kind": "t5", "std": 0.5}},
    "learned": {**WIDE, "attention": {"heads": 4}, "position": {"kind": "learned", "std": 0.5}},
    "untied-softcap": {
        **WIDE,
        "attention": {"heads": 4},
        "head": {"kind": "lm", "tied": False, "bias": True, "softcap": 20.0},
    },
    "retention": {**WIDE, "attention": {"kind": "retention", "heads": 4, "chunk": 3}},
    "mla": {
        **WIDE,
        "attention": {"kind": "mla", "heads": 4, "kv_latent": 12, "nope_dim": 8, "rope_dim": 4, "v_dim": 8},
    },
    "dilated": {**WIDE, "attention": {"kind": "dilated", "heads": 4, "segments": [4, 16], "dilations": [1, 2]}},
    "xpos": {**WIDE, "attention": {"heads": 4}, "position": "xpos"},
    "yoco": {
        **WIDE,
        "attention": {"heads": 4},
        "stack": {"kind": "yoco", "self_attention": {"kind": "gated_retention", "heads": 4}},
    },
    "hysparse": {
        **WIDE,
        "depth": 3,
        "attention": {"heads": 4, "kv_heads": 2},
        "stack": {"kind": "hysparse", "sparse_per_full": 1, "block": 2, "top_tokens": 4, "window": 3},
    },
    "lazy": {**WIDE, "attention": {"heads": 4}, "stack": "lazy"},
    "tim": {**WIDE, "attention": {"heads": 4}, "stack": {"kind": "tim", "plain_first": 0, "plain_last": 1}},
    "longmem": {**WIDE, "attention": {"heads": 4}, "stack": "longmem"},
    "experts": {
        **WIDE,
        "attention": {"heads": 4},
        "ffn": {"kind": "moe", "experts": 4, "shared": 1, "hidden": 16, "router": "sigmoid_bias"},
    },
    "dropout": {**WIDE, "attention": {"heads": 4}, "dropout": 0.2},
    "masked": {**WIDE, "attention": {"heads": 4}, "causal": False, "head": "mlm"},
}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@functools.cache
def run(name: str) -> RunFolder:
    """The run of that model, two steps long. Tests only read it, and find torch's random state as they left it."""
    folder = Path(_folder().name)
    sections: dict[str, Any] = {"objective": tiny.MASKED["objective"]} if name == "masked" else {}
    data = tiny.recipe(
        folder,
        model=MODELS[name],
        trainer={"steps": 2, "save_every": 2},
        evaluate={"every": 2, "test": False},
        **sections,
    )
    with torch.random.fork_rng():  # a training seeds it, and which test is the first to ask must not matter
        return torchstone.train(data, out=str(folder / name), quiet=True)
