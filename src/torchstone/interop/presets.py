"""Presets: the published sizes of known models, by name.

    presets()                    # ["bert-base-cased", ..., "xlm-roberta-large"]
    preset("llama-3.2-1b")       # its TransformerSpec, no file and no network needed

`presets.json` has what their config.json says of the model; their layout makes the spec of it, as `import` does. Models
that a paper describes and that have no published layout are in `sizes/`, a file a paper: names, each with the fields of
a model.
"""

from __future__ import annotations

import copy
import functools
import importlib.resources
import json
from typing import TYPE_CHECKING, Any

from torchstone.errors import TorchstoneError, nearest

if TYPE_CHECKING:
    from torchstone.model.transformer import TransformerSpec

__all__ = ["preset", "preset_config", "presets"]


@functools.cache
def _configs() -> dict[str, dict[str, Any]]:
    text = (importlib.resources.files("torchstone.interop") / "presets.json").read_text(encoding="utf-8")
    return json.loads(text)


@functools.cache
def _specs() -> dict[str, dict[str, Any]]:
    import yaml

    found: dict[str, dict[str, Any]] = {}
    for file in (importlib.resources.files("torchstone.interop") / "sizes").iterdir():
        if file.name.endswith(".yaml"):
            found |= yaml.safe_load(file.read_text(encoding="utf-8"))
    return found


def presets() -> list[str]:
    """Names of the presets, sorted."""
    return sorted({*_configs(), *_specs()})


def preset_config(name: str) -> dict[str, Any]:
    """What the published config.json of a preset says of the model.

    Raises:
        TorchstoneError: there is no preset of that name, or it has no config.json.
    """
    if name in _specs():
        raise TorchstoneError(f"preset {name}: a paper's sizes, not a published config.json")
    if name not in _configs():
        near = nearest(name.lower(), presets())
        raise TorchstoneError(f"no preset {name!r}{near or '; presets: ' + ', '.join(presets())}")
    return copy.deepcopy(_configs()[name])


def preset(name: str) -> TransformerSpec:
    """The spec of a preset, with the head that it was published with.

    Raises:
        TorchstoneError: there is no preset of that name.
    """
    from torchstone.interop.layout import find_layout
    from torchstone.model.transformer import TransformerSpec
    from torchstone.spec import validate

    if name in _specs():
        return validate(TransformerSpec, _specs()[name])
    config = preset_config(name)
    return validate(TransformerSpec, find_layout(config["model_type"]).to_spec(config))
