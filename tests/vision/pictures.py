"""A tiny training of masked image modelling: its pictures, its tokenizer, its recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchstone.data.images import ImagesDataSpec
from torchstone.model.site import initialise
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.spec import validate
from torchstone.vision.tokenizers import fit_k_means

CODES, IMAGE, PATCH = 6, 8, 2
ENCODER: dict[str, Any] = {
    "width": 16,
    "depth": 2,
    "causal": False,
    "vocabulary": CODES,
    "attention": {"heads": 2, "bias": "qvo"},
    "position": {"kind": "relative_2d"},
    "ffn": {"kind": "mlp", "bias": True},
    "norm": {"kind": "layernorm", "eps": 1e-12},
    "residual": "layer_scale",
    "embedding": {"kind": "patch", "image": IMAGE, "patch": PATCH, "channels": 1, "mask_token": True},
    "head": {"kind": "lm", "tied": False, "bias": True},
}
CLASSIFIER: dict[str, Any] = {
    "position": {"shared": False},
    "residual": {"final": False},
    "head": {"kind": "classification", "classes": 3, "pool": "patches", "norm": True, "scale": 0.001},
}
"""What fine-tuning changes of it."""


def encoder(noise: float = 0.1, **fields: Any) -> Transformer:
    """The model, its parameters not all alike."""
    model = initialise(validate(TransformerSpec, {**ENCODER, **fields}).build(), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model.eval()  # type: ignore[return-value]


def stripes(folder: Path, image: int = IMAGE) -> Path:
    """A file of pictures of three classes: stripes that lie, stripes that stand, none."""
    file = folder / f"stripes-{image}.npz"
    if not file.exists():
        rng = np.random.default_rng(0)
        label = rng.integers(3, size=90)
        pixels = rng.random((90, 1, image, image)) * 0.5
        pixels[label == 0, :, ::2] += 0.5
        pixels[label == 1, :, :, ::2] += 0.5
        np.savez(file, x=pixels, y=label)
    return file


def k_means(folder: Path, codes: int = CODES, stride: int = PATCH) -> Path:
    """A file of a tokenizer of these pictures."""
    file = folder / f"k-means-{codes}-{stride}.safetensors"
    if not file.exists():
        train = ImagesDataSpec(path=str(stripes(folder))).prepare().train
        fit_k_means((batch["pixels"] for batch in train.evaluation(32)), codes, stride).save(file)
    return file


def recipe(folder: Path, **sections: Any) -> dict[str, Any]:
    """Plain data of the recipe; sections are laid over it."""
    base: dict[str, Any] = {
        "model": dict(ENCODER),
        "data": {"kind": "images", "path": str(stripes(folder)), "valid": 0.2},
        "objective": {
            "kind": "masked_image",
            "tokenizer": str(k_means(folder)),
            "mask": {"ratio": 0.45, "min_patches": 1},
        },
        "schedule": {"kind": "constant"},
        "trainer": {
            "steps": 4,
            "batch": 6,
            "device": "cpu",
            "threads": 1,
            "compile": "off",
            "log_every": 1,
            "save_every": 2,
        },
        "evaluate": {"every": 4, "blocks": 12},
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section} if isinstance(section, dict) else section
    return base
