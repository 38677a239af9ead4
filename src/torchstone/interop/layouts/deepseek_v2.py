"""DeepSeek-V2: Llama's decoder with latent attention (DeepSeek-AI 2024, arXiv 2405.04434), for layers without experts.

Published code extends the context by YaRN with two factors: what it makes of `mscale` over what it makes of
`mscale_all_dim` goes onto rotated queries and keys, and the square of the latter onto all scores, also of the channels
that no rotation touches. The latents' norms have an eps of their own, which no config mentions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torchstone.errors import TorchstoneError
from torchstone.interop.layout import HEAD_BY_HEAD, Config, Layout, Model, Rule, Shapes
from torchstone.interop.layouts._shared import yarn_temperature
from torchstone.interop.layouts.llama import COPIES, HEADS, KINDS, RULES, SKIPPED, body, trunk_config

__all__ = ["LAYOUT"]

_OURS, _THEIRS = "decoder.layers.{i}.attention", "model.layers.{i}.self_attn"
_LATENT_EPS = 1e-6


def _times(temperature: float, factor: float) -> float:
    """The inverse of `yarn_temperature`, without the noise of its last digits."""
    return round((temperature - 1.0) / (0.1 * math.log(factor)), 12)


def _spec(config: Config, head: str, shapes: Shapes | None) -> dict[str, Any]:
    depth, dense = config.need("num_hidden_layers"), config.get("first_k_dense_replace", 0)
    if dense < depth:
        raise TorchstoneError(
            f"{config.model_type} config: first_k_dense_replace {dense} gives {depth - dense} of {depth} layers "
            f"experts, and there is no ffn of experts; supported: {depth} or more, which gives none"
        )
    config.only("attention_bias", False)
    heads = config.need("num_attention_heads")
    config.only("num_key_value_heads", heads)
    nope, rope = config.get("qk_nope_head_dim", 128), config.get("qk_rope_head_dim", 64)
    spec = body(config, {})
    scale, scaling = None, spec["position"].get("scaling")
    given = config.get("rope_parameters", None) or config.get("rope_scaling", {})
    if scaling is not None and isinstance(given, Mapping) and given.get("mscale_all_dim"):
        scale = (nope + rope) ** -0.5 * yarn_temperature(given["mscale_all_dim"], scaling["factor"]) ** 2
    attention = {
        "kind": "mla",
        "heads": heads,
        "kv_latent": config.get("kv_lora_rank", 512),
        # here null says something: no latent; only a config without the key has the default
        "q_latent": config.values.get("q_lora_rank", 1536),
        "nope_dim": nope,
        "rope_dim": rope,
        "v_dim": config.get("v_head_dim", 128),
        "eps": _LATENT_EPS,
        "scale": scale,
        "dropout": config.get("attention_dropout", 0.0),
    }
    return {**spec, "attention": attention, "position": {**spec["position"], "interleaved": True}}


def _config(model: Model) -> dict[str, Any]:
    layer: Any = model.decoder[0]
    attention, trunk = layer.attention, trunk_config(model)
    return {
        **trunk,
        **_scaled(attention, layer.position, trunk),
        "num_key_value_heads": attention.heads,
        "first_k_dense_replace": len(model.decoder),
        "kv_lora_rank": attention.kv_latent,
        "q_lora_rank": attention.q_latent,
        "qk_nope_head_dim": attention.nope_dim,
        "qk_rope_head_dim": attention.rope_dim,
        "v_head_dim": attention.v_dim,
        "attention_bias": False,
        "mlp_bias": layer.ffn.bias,
    }


def _scaled(attention: Any, position: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary config with the factor on all scores.

    Raises:
        TorchstoneError: scores have a factor that no YaRN explains.
    """
    over = attention.scale * (attention.nope_dim + attention.rope_dim) ** 0.5
    if abs(over - 1.0) < 1e-12:
        return {}
    scaling = position.scaling
    if scaling is None or scaling.kind != "yarn" or scaling.factor <= 1:
        raise TorchstoneError(
            f"the deepseek_v2 layout has no place for attention.scale {attention.scale}; it takes another one than "
            "1 / sqrt(nope_dim + rope_dim) with position.scaling yarn alone"
        )
    mscales = {"mscale_all_dim": _times(math.sqrt(over), scaling.factor)}
    if scaling.temperature is not None:
        mscales["mscale"] = _times(math.sqrt(over) * scaling.temperature, scaling.factor)

    def told(values: Mapping[str, Any]) -> dict[str, Any]:
        return {**{name: value for name, value in values.items() if name != "attention_factor"}, **mscales}

    return {name: told(config[name]) for name in ("rope_parameters", "rope_scaling")}


LAYOUT = Layout(
    model_type="deepseek_v2",
    misread=(".gate_proj", ".up_proj", ".down_proj"),
    sides=("decoder",),
    architectures={"DeepseekV2ForCausalLM": "lm"},
    kinds={**KINDS, "attention": ("mla",)},
    spec=_spec,
    config=_config,
    rules=(
        *(rule for rule in RULES if ".attention." not in rule.ours),
        Rule(f"{_OURS}.qkv.weight", (f"{_THEIRS}.q_proj.weight", f"{_THEIRS}.kv_a_proj_with_mqa.weight")),
        Rule(f"{_OURS}.down.weight", (f"{_THEIRS}.q_a_proj.weight", f"{_THEIRS}.kv_a_proj_with_mqa.weight")),
        Rule(f"{_OURS}.q_norm.weight", f"{_THEIRS}.q_a_layernorm.weight"),
        Rule(f"{_OURS}.q_up.weight", f"{_THEIRS}.q_b_proj.weight"),
        Rule(f"{_OURS}.kv_norm.weight", f"{_THEIRS}.kv_a_layernorm.weight"),
        Rule(f"{_OURS}.kv_up.weight", f"{_THEIRS}.kv_b_proj.weight", HEAD_BY_HEAD),
        Rule(f"{_OURS}.out.weight", f"{_THEIRS}.o_proj.weight"),
    ),
    heads=HEADS,
    copies=COPIES,
    skipped=SKIPPED,
    prefix="model.",
)
