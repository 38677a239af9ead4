"""BitNet b1.58: Llama's decoder with Sub-LN, a squared relu on gates, and weights of three values (Ma et al. 2025,
arXiv 2504.12285).

Its `quantization_config` says what the tensors are. Mode "online": weights in full precision, which each product makes
three values of, and which train; mode "offline": bytes of four weights and a scale for each matrix, our `packed` form.
Without one, projections are not quantised at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchstone.errors import TorchstoneError
from torchstone.interop.layout import Config, Layout, Model, Pieces, Rule, Shapes
from torchstone.interop.layouts import llama
from torchstone.interop.layouts.llama import COPIES, HEADS, SKIPPED, body, body_config
from torchstone.ops.bitlinear import pack, unpack

__all__ = ["LAYOUT"]

_OURS, _THEIRS = "decoder.layers.{i}", "model.layers.{i}"
_PROJECTIONS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "ffn.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn.down": ("mlp.down_proj",),
}


class _Packed(Pieces):
    """Theirs (O / 4, I): byte (r, i) holds column i of rows r, r + O / 4, ... Ours (O, 1, I / 4): see `pack`."""

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        # theirs are ours turned around: four outputs in a byte in the place of four inputs
        return torch.cat([pack(unpack(t.t(), 4 * len(t), 3).t(), 3) for t in theirs])[:, None]

    def split(self, ours: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        return [pack(unpack(o[:, 0], 4 * o.shape[-1], 3).t(), 3).t() for o in ours.split(list(sizes))]

    def shapes(self, ours: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, ...]]:
        return [(size // 4, 4 * ours[-1]) for size in sizes]


class _Scales(Pieces):
    """Theirs (1,) each, ours (slices, 1)."""

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack(list(theirs))

    def split(self, ours: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        return list(ours.unbind())

    def shapes(self, ours: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, ...]]:
        return [(1,) for _ in sizes]


_MODES = {"online": False, "offline": True}
"""Their mode -> whether our weights are packed."""


def _linear(config: Config) -> dict[str, Any]:
    """The kind of projections.

    Raises:
        TorchstoneError: they are quantised in a way that we have not.
    """
    given = config.get("quantization_config", None)
    if given is None:
        return {"kind": "dense"}
    values = Config(f"{config.model_type} quantization", given)
    values.choose("linear_class", {"autobitlinear": None}, "bitlinear")  # the other class keeps one over the scale
    values.only("use_rms_norm", False)
    packed = values.choose("quantization_mode", _MODES, "offline")
    if packed:
        config.only("attention_bias", False)  # theirs would multiply it by the scale
    return {"kind": "bitlinear", "norm": "none", "packed": packed}


def _spec(config: Config, head: str, shapes: Shapes | None) -> dict[str, Any]:
    bias = "all" if config.get("attention_bias", False) else "none"
    given = {name: value for name, value in config.values.items() if value is not None}
    defaults = {"hidden_act": "relu2", "rms_norm_eps": 1e-5, "num_key_value_heads": 5, "rope_theta": 500_000.0}
    config = Config(config.model_type, {**defaults, **given})
    spec = body(config, {"head_dim": config.get("head_dim", None), "bias": bias})
    residual = {"kind": "subln", "std": config.get("initializer_range", 0.02)}
    return {**spec, "residual": residual, "linear": _linear(config)}


def _config(model: Model) -> dict[str, Any]:
    layer: Any = model.decoder[0]
    config = {**body_config(model), "attention_bias": layer.attention.bias == "all"}
    if layer.linear.kind != "bitlinear":
        return config
    if layer.linear.packed and any(size % 4 for size in _sizes(model)):
        raise TorchstoneError(
            "the bitnet layout has no place for packed matrices whose inputs or outputs 4 does not divide: "
            f"{', '.join(map(str, _sizes(model)))}"
        )
    mode = "offline" if layer.linear.packed else "online"
    quantised = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": mode}
    return {**config, "quantization_config": quantised}


def _sizes(model: Model) -> tuple[int, ...]:
    layer: Any = model.decoder[0]
    heads = (layer.attention.heads, layer.attention.kv_heads)
    return (model.spec.width, layer.ffn.hidden, *(number * layer.attention.head_dim for number in heads))


def _of(suffix: str, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{_THEIRS}.{name}.{suffix}" for name in names)


LAYOUT = Layout(
    model_type="bitnet",
    sides=("decoder",),
    architectures={"BitNetForCausalLM": "lm"},
    kinds={**llama.KINDS, "residual": ("subln",), "linear": ("dense", "bitlinear")},
    spec=_spec,
    config=_config,
    rules=(
        *llama.RULES,
        Rule(f"{_OURS}.attention.inner_norm.weight", f"{_THEIRS}.self_attn.attn_sub_norm.weight"),
        Rule(f"{_OURS}.ffn.inner_norm.weight", f"{_THEIRS}.mlp.ffn_sub_norm.weight"),
        *(Rule(f"{_OURS}.{ours}.packed", _of("weight", names), _Packed()) for ours, names in _PROJECTIONS.items()),
        *(Rule(f"{_OURS}.{ours}.beta", _of("weight_scale", names), _Scales()) for ours, names in _PROJECTIONS.items()),
    ),
    heads=HEADS,
    copies=COPIES,
    skipped=SKIPPED,
    prefix="model.",
    quantised=("bitnet",),
)
