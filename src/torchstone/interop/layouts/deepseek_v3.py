"""DeepSeek-V3: DeepSeek-V2's decoder, its experts chosen by sigmoids and a bias (DeepSeek-AI 2024, arXiv 2412.19437).

The module that predicts a further token is stored as a layer after the last; it is no part of the main model and is
left.
"""

from __future__ import annotations

from typing import Any

from torchstone.interop.layout import Config, Layout, Model, Rule, Shapes
from torchstone.interop.layouts.deepseek_v2 import KINDS, MISREAD, RULES, decoder, decoder_config
from torchstone.interop.layouts.llama import COPIES, HEADS, SKIPPED

__all__ = ["LAYOUT"]

_DEFAULTS = {
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "routed_scaling_factor": 2.5,
}


def _spec(config: Config, head: str, shapes: Shapes | None) -> dict[str, Any]:
    given = {name: value for name, value in config.values.items() if value is not None or name == "q_lora_rank"}
    config = Config(config.model_type, {**_DEFAULTS, **given})
    config.only("topk_method", "noaux_tc")
    config.only("scoring_func", "sigmoid")
    router = {
        "kind": "sigmoid_bias",
        "groups": config.get("n_group", 8),
        "keep_groups": config.get("topk_group", 4),
        "normalise": config.get("norm_topk_prob", True),
        "sequence_balance": config.get("aux_loss_alpha", 1e-4),
    }
    return decoder(config, router)


def _config(model: Model) -> dict[str, Any]:
    layer: Any = model.decoder[-1]
    # readers expect the module that predicts a further token unless told that there is none
    config = {
        **decoder_config(model),
        "rope_interleave": layer.position.interleaved,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "num_nextn_predict_layers": 0,
    }
    return config | ({"aux_loss_alpha": layer.ffn.router.sequence_balance} if layer.ffn.kind == "moe" else {})


LAYOUT = Layout(
    model_type="deepseek_v3",
    misread=MISREAD,
    sides=("decoder",),
    architectures={"DeepseekV3ForCausalLM": "lm"},
    kinds={**KINDS, "router": ("sigmoid_bias",)},
    spec=_spec,
    config=_config,
    rules=(
        *RULES,
        Rule("decoder.layers.{i}.ffn.router.bias", "model.layers.{i}.mlp.gate.e_score_correction_bias"),
    ),
    heads=HEADS,
    copies=COPIES,
    skipped=(*SKIPPED, "model.layers.{depth}.*"),
    prefix="model.",
)
