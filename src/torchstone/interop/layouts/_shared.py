"""What several layouts spell alike: activations, gates, rotary positions, windows, classes, patches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchstone.errors import TorchstoneError
from torchstone.interop.layout import Config, Model, Pieces
from torchstone.model.transformer import TransformerSpec

__all__ = [
    "ACTIVATIONS",
    "CONVOLUTION",
    "GATES",
    "SINGLE",
    "After",
    "activation_name",
    "class_names",
    "classes",
    "gate_name",
    "rotary",
    "rotary_config",
    "windows_config",
    "with_windows",
    "yarn_temperature",
]

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
"""Their name -> ours. The first of several is the one that is written."""

GATES: dict[str, dict[str, Any]] = {
    "silu": {"kind": "swiglu"},
    "swish": {"kind": "swiglu"},
    "gelu": {"kind": "geglu", "activation": "gelu"},
    "gelu_new": {"kind": "geglu", "activation": "gelu_tanh"},
    "gelu_pytorch_tanh": {"kind": "geglu", "activation": "gelu_tanh"},
    "relu": {"kind": "reglu", "activation": "relu"},
    "relu2": {"kind": "reglu", "activation": "relu2"},
}
"""Their name of a gate's activation -> our gated feed-forward."""


@dataclass(frozen=True)
class After(Pieces):
    """Ours is theirs without its first `rows`."""

    rows: int

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        return super().join(theirs)[self.rows :]

    def split(self, ours: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        return [torch.cat([ours.new_zeros(self.rows, *ours.shape[1:]), ours])]

    def shapes(self, ours: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, ...]]:
        return [(ours[0] + self.rows, *ours[1:])]


@dataclass(frozen=True)
class _Convolution(Pieces):
    """Ours (D, C * P * P) is theirs (D, C, P, P)."""

    channels: int = 1
    side: int = 1

    def at(self, spec: TransformerSpec, slices: Sequence[int]) -> Pieces:
        embedding: Any = spec.embedding
        return _Convolution(embedding.channels, embedding.patch)

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        return theirs[0].flatten(1)

    def split(self, ours: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        return [ours.unflatten(1, (self.channels, self.side, self.side))]

    def shapes(self, ours: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, ...]]:
        return [(ours[0], self.channels, self.side, self.side)]


class _Single(Pieces):
    """Ours (D,) is theirs (1, 1, D)."""

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        return theirs[0].flatten()

    def split(self, ours: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        return [ours[None, None]]

    def shapes(self, ours: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, ...]]:
        return [(1, 1, *ours)]


CONVOLUTION = _Convolution()
SINGLE = _Single()


def activation_name(ours: str) -> str:
    """Their name of our activation."""
    return next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)


def gate_name(ffn: Any) -> str:
    """Their name of the activation of our gated feed-forward, or of our experts."""
    activation = getattr(ffn, "activation", None)
    if ffn.kind == "moe":
        return activation_name(ffn.activation)
    return next(
        theirs for theirs, gate in GATES.items() if gate["kind"] == ffn.kind and gate.get("activation") == activation
    )


def rotary(config: Config) -> dict[str, Any]:
    """The rotary position of a config: `rope_parameters`, or before version 5 `rope_theta` and `rope_scaling`.

    Raises:
        TorchstoneError: a scaling that the backbone has not.
    """
    values = config.get("rope_parameters", None) or config.get("rope_scaling", {})
    if not isinstance(values, Mapping):
        raise TorchstoneError(f"{config.model_type} config: rope_parameters needs a mapping, got {values!r:.60}")
    given = Config(config.model_type, values)
    given.only("partial_rotary_factor", 1.0)
    config.only("partial_rotary_factor", 1.0)
    base = given.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = given.get("rope_type", given.get("type", "default"))
    if kind != "default" and kind not in _SCALINGS:
        raise TorchstoneError(
            f"{config.model_type} config: rope_type {kind!r} is not supported; supported: default, "
            f"{', '.join(_SCALINGS)}"
        )
    scaling = {} if kind == "default" else {"scaling": _SCALINGS[kind](given, config)}
    return {"kind": "rotary", "base": float(base), **scaling}


def _linear(given: Config, config: Config) -> dict[str, Any]:
    return {"kind": "linear", "factor": given.need("factor")}


def _llama3(given: Config, config: Config) -> dict[str, Any]:
    return {
        "kind": "llama3",
        "factor": given.need("factor"),
        "low": given.need("low_freq_factor"),
        "high": given.need("high_freq_factor"),
        "original": _original(given, config),
    }


def _yarn(given: Config, config: Config) -> dict[str, Any]:
    original = _original(given, config)
    factor = given.get("factor", config.need("max_position_embeddings") / original)

    size, above, below = (given.get(key, None) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if size is None and above and below:
        size = yarn_temperature(above, factor) / yarn_temperature(below, factor)
    return {
        "kind": "yarn",
        "factor": factor,
        "original": original,
        "fast": given.get("beta_fast", 32),
        "slow": given.get("beta_slow", 1),
        "temperature": size,
        "truncate": given.get("truncate", True),
    }


def yarn_temperature(times: float, factor: float) -> float:
    """What published code makes of an `mscale` or `mscale_all_dim` of `times`."""
    return 0.1 * times * math.log(factor) + 1.0 if factor > 1 else 1.0


def _original(given: Config, config: Config) -> int:
    key = "original_max_position_embeddings"
    return config.get(key, given.get(key, config.need("max_position_embeddings")))


_SCALINGS = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}


def rotary_config(position: Any) -> dict[str, Any]:
    """The config of a rotary position, for readers of version 5 and for those before.

    Raises:
        TorchstoneError: a scaling that the layouts have not.
    """
    scaling = position.scaling
    if scaling is None:
        own: dict[str, Any] = {}
    elif scaling.kind == "linear":
        own = {"rope_type": "linear", "factor": scaling.factor}
    elif scaling.kind == "llama3":
        own = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.original,
        }
    elif scaling.kind == "yarn":
        own = {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original,
            "beta_fast": scaling.fast,
            "beta_slow": scaling.slow,
            "truncate": scaling.truncate,
        }
        if scaling.temperature is not None:
            own["attention_factor"] = scaling.temperature
    else:
        raise TorchstoneError(
            f"rotary scaling {scaling.kind} has no place in published layouts; they take linear, llama3 or yarn"
        )
    return {
        "rope_parameters": {"rope_type": "default", **own, "rope_theta": position.base},
        "rope_theta": position.base,
        "rope_scaling": own or None,
    }


def with_windows(spec: dict[str, Any], config: Config) -> dict[str, Any]:
    """The spec of a decoder, some or all of whose layers have the config's `sliding_window`."""
    at = _windowed(config)
    if at and len(at) == spec["depth"]:
        return {**spec, "attention": {**spec["attention"], "window": config.need("sliding_window")}}
    return {**spec, "layers": [{"at": at, "attention": {"window": config.need("sliding_window")}}]} if at else spec


def _windowed(config: Config) -> list[int]:
    """Numbers of the layers with a window: listed, or before version 4.50 all from `max_window_layers` on.

    Raises:
        TorchstoneError: a layer of another type.
    """
    depth = config.need("num_hidden_layers")
    windowed = config.get("use_sliding_window", False) and config.get("sliding_window", 4096) is not None
    first = config.get("max_window_layers", 28) if windowed else depth
    default = ["full_attention"] * min(first, depth) + ["sliding_attention"] * max(0, depth - first)
    kinds = config.get("layer_types", default)
    for kind in kinds:
        Config(config.model_type, {"layer_types": kind}).choose(
            "layer_types", {"full_attention": 0, "sliding_attention": 0}, kind
        )
    return [number for number, kind in enumerate(kinds) if kind == "sliding_attention"]


def windows_config(model: Model) -> dict[str, Any]:
    """The config of a decoder's windows."""
    attentions: list[Any] = [layer.attention for layer in model.decoder]
    windows = [attention.window for attention in attentions if attention.window is not None]
    return {
        "use_sliding_window": bool(windows),
        "sliding_window": windows[0] if windows else None,
        # from here on; readers that know `layer_types` go by those
        "max_window_layers": next((i for i, attention in enumerate(attentions) if attention.window), len(attentions)),
        "layer_types": ["sliding_attention" if attention.window else "full_attention" for attention in attentions],
    }


def classes(config: Config) -> int:
    """The number of classes, which a config.json gives by naming them; two without names."""
    names = config.get("id2label", None)
    return config.get("num_labels", 2) if names is None else len(names)


def class_names(number: int) -> dict[str, Any]:
    """The config of so many classes."""
    names = {str(label): f"LABEL_{label}" for label in range(number)}
    return {"id2label": names, "label2id": {name: int(label) for label, name in names.items()}}
