"""DeepSeek-V2: Llama's decoder with latent attention and, from some layer on, experts (DeepSeek-AI 2024, arXiv
2405.04434).

Published code extends the context by YaRN with two factors: what it makes of `mscale` over what it makes of
`mscale_all_dim` goes onto rotated queries and keys, and the square of the latter onto all scores, also of the channels
that no rotation touches. The latents' norms have an eps of their own, which no config mentions.

`decoder`, `decoder_config`, `KINDS` and `RULES` serve DeepSeek-V3 too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torchstone.errors import TorchstoneError
from torchstone.interop.layout import HEAD_BY_HEAD, Config, Layout, Model, Rule, Shapes
from torchstone.interop.layouts import llama
from torchstone.interop.layouts._shared import yarn_temperature
from torchstone.interop.layouts.llama import COPIES, HEADS, SKIPPED, body, trunk_config

__all__ = ["KINDS", "LAYOUT", "MISREAD", "RULES", "decoder", "decoder_config"]

_OURS, _THEIRS = "decoder.layers.{i}.attention", "model.layers.{i}.self_attn"
_FFN, _MLP = "decoder.layers.{i}.ffn", "model.layers.{i}.mlp"
_LATENT_EPS = 1e-6
_EXPERT = f"{_MLP}.experts.{{e}}"

KINDS = {**llama.KINDS, "attention": ("mla",), "ffn": (*llama.KINDS["ffn"], "moe")}
MISREAD = (".gate_proj", ".up_proj", ".down_proj")
RULES = (
    *(rule for rule in llama.RULES if ".attention." not in rule.ours),
    Rule(f"{_OURS}.qkv.weight", (f"{_THEIRS}.q_proj.weight", f"{_THEIRS}.kv_a_proj_with_mqa.weight")),
    Rule(f"{_OURS}.down.weight", (f"{_THEIRS}.q_a_proj.weight", f"{_THEIRS}.kv_a_proj_with_mqa.weight")),
    Rule(f"{_OURS}.q_norm.weight", f"{_THEIRS}.q_a_layernorm.weight"),
    Rule(f"{_OURS}.q_up.weight", f"{_THEIRS}.q_b_proj.weight"),
    Rule(f"{_OURS}.kv_norm.weight", f"{_THEIRS}.kv_a_layernorm.weight"),
    Rule(f"{_OURS}.kv_up.weight", f"{_THEIRS}.kv_b_proj.weight", HEAD_BY_HEAD),
    Rule(f"{_OURS}.out.weight", f"{_THEIRS}.o_proj.weight"),
    Rule(f"{_FFN}.router.weight", f"{_MLP}.gate.weight"),
    Rule(f"{_FFN}.up.weight", (f"{_EXPERT}.gate_proj.weight", f"{_EXPERT}.up_proj.weight")),
    Rule(f"{_FFN}.down.weight", f"{_EXPERT}.down_proj.weight"),
    Rule(
        f"{_FFN}.shared.up.weight", (f"{_MLP}.shared_experts.gate_proj.weight", f"{_MLP}.shared_experts.up_proj.weight")
    ),
    Rule(f"{_FFN}.shared.down.weight", f"{_MLP}.shared_experts.down_proj.weight"),
)


def decoder(config: Config, router: dict[str, Any]) -> dict[str, Any]:
    """The spec of a decoder of this family; `router` chooses among experts."""
    config.only("attention_bias", False)
    heads = config.need("num_attention_heads")
    config.only("num_key_value_heads", heads)
    nope, rope = config.get("qk_nope_head_dim", 128), config.get("qk_rope_head_dim", 64)
    spec = body(config, {})
    scale, scaling = None, spec["position"].get("scaling")
    given = config.get("rope_parameters", None) or config.get("rope_scaling", {})
    if scaling is not None and isinstance(given, Mapping) and given.get("mscale_all_dim"):
        scale = (nope + rope) ** -0.5 * yarn_temperature(given["mscale_all_dim"], scaling["factor"]) ** 2
    spec["position"]["interleaved"] = config.get("rope_interleave", True)
    spec["attention"] = {
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
    dense = config.get("first_k_dense_replace", 0)
    if dense >= spec["depth"]:
        return spec
    config.only("mlp_bias", False)
    config.only("moe_layer_freq", 1)
    experts = {
        "kind": "moe",
        "experts": config.get("n_routed_experts", 64),
        "active": config.need("num_experts_per_tok"),
        "shared": config.get("n_shared_experts", 2),
        "hidden": config.get("moe_intermediate_size", 1407),
        "activation": spec["ffn"].get("activation", "silu"),
        "router": {"scale": config.get("routed_scaling_factor", 1.0), **router},
    }
    layers = [{"at": list(range(dense)), "ffn": spec["ffn"]}] if dense else []
    return {**spec, "ffn": experts, "layers": layers}


def decoder_config(model: Model) -> dict[str, Any]:
    """The config of a decoder of this family."""
    layer: Any = model.decoder[0]
    attention, trunk = layer.attention, trunk_config(model)
    dense = [layer.ffn.kind for layer in model.decoder]
    dense = dense[: dense.index("moe")] if "moe" in dense else dense
    return {
        **trunk,
        **_scaled(attention, layer.position, trunk),
        "num_key_value_heads": attention.heads,
        "first_k_dense_replace": len(dense),
        "kv_lora_rank": attention.kv_latent,
        "q_lora_rank": attention.q_latent,
        "qk_nope_head_dim": attention.nope_dim,
        "qk_rope_head_dim": attention.rope_dim,
        "v_head_dim": attention.v_dim,
        "attention_bias": False,
        **(_experts(model.decoder[len(dense)].ffn) if len(dense) < len(model.decoder) else {}),
    }


def _experts(ffn: Any) -> dict[str, Any]:
    return {
        "n_routed_experts": ffn.experts,
        "num_experts_per_tok": ffn.active,
        "n_shared_experts": ffn.shared,
        "moe_intermediate_size": ffn.hidden,
        "moe_layer_freq": 1,
        "n_group": ffn.router.groups,
        "topk_group": ffn.router.keep_groups,
        "norm_topk_prob": ffn.router.normalise,
        "routed_scaling_factor": ffn.router.scale,
    }


def _times(temperature: float, factor: float) -> float:
    """The inverse of `yarn_temperature`, without the noise of its last digits."""
    return round((temperature - 1.0) / (0.1 * math.log(factor)), 12)


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
            f"layouts of latent attention have no place for attention.scale {attention.scale}; they take another one "
            "than 1 / sqrt(nope_dim + rope_dim) with position.scaling yarn alone"
        )
    mscales = {"mscale_all_dim": _times(math.sqrt(over), scaling.factor)}
    if scaling.temperature is not None:
        mscales["mscale"] = _times(math.sqrt(over) * scaling.temperature, scaling.factor)

    def told(values: Mapping[str, Any]) -> dict[str, Any]:
        return {**{name: value for name, value in values.items() if name != "attention_factor"}, **mscales}

    return {name: told(config[name]) for name in ("rope_parameters", "rope_scaling")}


_METHODS = {"greedy": False, "group_limited_greedy": True}


def _spec(config: Config, head: str, shapes: Shapes | None) -> dict[str, Any]:
    config.only("norm_topk_prob", False)
    config.only("scoring_func", "softmax")
    config.only("rope_interleave", True)
    limited = config.choose("topk_method", _METHODS, "greedy")
    alpha, rows = config.get("aux_loss_alpha", 0.001), config.get("seq_aux", True)
    router = {
        "kind": "topk",
        "groups": config.get("n_group", 1),
        "keep_groups": config.need("topk_group") if limited else None,
        "balance": 0.0 if rows else alpha,
        "sequence_balance": alpha if rows else 0.0,
    }
    return decoder(config, router)


def _config(model: Model) -> dict[str, Any]:
    layer: Any = model.decoder[0]
    config = {**decoder_config(model), "mlp_bias": getattr(layer.ffn, "bias", False)}
    if config["first_k_dense_replace"] == len(model.decoder):
        return config
    last: Any = model.decoder[-1]
    router, limited = last.ffn.router, config["topk_group"] < config["n_group"]
    return {
        **config,
        "topk_method": "group_limited_greedy" if limited else "greedy",
        "scoring_func": "softmax",
        "aux_loss_alpha": router.sequence_balance or router.balance,
        "seq_aux": bool(router.sequence_balance),
    }


LAYOUT = Layout(
    model_type="deepseek_v2",
    misread=MISREAD,
    sides=("decoder",),
    architectures={"DeepseekV2ForCausalLM": "lm"},
    kinds={**KINDS, "router": ("topk",)},
    spec=_spec,
    config=_config,
    rules=RULES,
    heads=HEADS,
    copies=COPIES,
    skipped=SKIPPED,
    prefix="model.",
)
