"""Forms in which a kind is tried, besides its defaults: (family, kind) -> name -> fields.

Every kind has the variant "default" with no fields; an entry of that name replaces it, for kinds whose fields have no
defaults or whose defaults do not fit a model of width 32 and context 64. A new kind needs no entry here.
"""

from __future__ import annotations

from typing import Any

from torchstone.spec import kinds, resolve, validate

_MLA = {"kv_latent": 12, "nope_dim": 6, "rope_dim": 4, "v_dim": 5}
VARIANTS: dict[tuple[str, str], dict[str, dict[str, Any]]] = {
    ("attention", "softmax"): {
        "grouped": {"kv_heads": 2},
        "multi_query": {"kv_heads": 1},
        "window": {"window": 5},
        "qk_norm": {"qk_norm": True},
        "softcap": {"softcap": 2.0},
        "unscaled": {"scale": 1.0},
        "biases": {"bias": "all"},
        "head_dim": {"head_dim": 6, "bias": "qkv"},
        "no_key_bias": {"bias": "qvo"},
        "all": {"kv_heads": 2, "window": 3, "qk_norm": True, "softcap": 3.0, "bias": "all"},
    },
    ("attention", "retention"): {
        "chunks": {"form": "chunkwise", "chunk": 3, "value_expansion": 1.5},
        "steps": {"form": "recurrent", "value_expansion": 1.0},
    },
    ("attention", "gated_retention"): {
        "chunks": {"form": "chunkwise", "chunk": 3, "temperature": 2.0},
        "steps": {"form": "recurrent"},
    },
    ("attention", "mla"): {
        "default": _MLA,
        "q_latent": {**_MLA, "q_latent": 10, "scale": 0.5},
        "absorbed": {**_MLA, "form": "absorbed", "q_latent": 10},
        "naive": {**_MLA, "form": "naive", "v_dim": 12},
    },
    ("attention", "dilated"): {
        "mod": {"segments": [4, 8, 64], "dilations": [1, 2, 3]},
        "block": {
            "segments": [3, 5, 10],
            "dilations": [1, 2, 2],
            "offset": "block",
            "kv_heads": 2,
            "head_dim": 6,
            "scale": 1.0,
        },
        "mix_gradient": {"segments": [3, 9], "dilations": [1, 3], "mix_gradient": True, "qk_norm": True, "bias": "all"},
    },
    ("position", "rotary"): {
        "interleaved": {"interleaved": True},
        "half": {"fraction": 0.5},
        "inclusive": {"interleaved": True, "inclusive": True},
    },
    # the second fades so fast that a product holds two queries
    ("position", "xpos"): {
        "interleaved": {"interleaved": True, "scale_base": 8.0},
        "fast": {"scale_base": 0.2, "gamma": 0.3},
    },
    ("position", "t5"): {"few": {"buckets": 8, "far": 10}},
    # grids that the longest texts of the checks fit into; ids are then places of the grid
    ("position", "relative_2d"): {
        "default": {"side": 9},
        "layers": {"side": 9, "shared": False},
        "bare": {"side": 9, "class_token": False},
    },
    ("scaling", "linear"): {"default": {"factor": 4.0}},
    ("scaling", "ntk"): {"default": {"factor": 4.0}},
    ("scaling", "yarn"): {"default": {"factor": 4.0, "original": 16}},
    ("scaling", "llama3"): {"default": {"factor": 4.0, "original": 16}},
    ("ffn", "mlp"): {
        "gelu_tanh": {"activation": "gelu_tanh"},
        "relu": {"activation": "relu", "bias": True},
        "relu2": {"activation": "relu2"},
    },
    ("ffn", "geglu"): {"tanh": {"activation": "gelu_tanh", "bias": True, "hidden": 40}},
    ("ffn", "reglu"): {"squared": {"activation": "relu2", "bias": True, "hidden": 40}},
    ("ffn", "multiway"): {"biases": {"modalities": 3, "hidden": 20, "bias": True, "activation": "relu"}},
    ("ffn", "moe"): {"default": {"experts": 4, "hidden": 12}},
    ("ffn", "gshard"): {
        "default": {"experts": 4, "hidden": 12},
        "full": {"experts": 3, "hidden": 8, "gated": True, "bias": False, "renormalise": True, "capacity": 1.0},
    },
    ("router", "gshard"): {"rank": {"rank": 3, "second": "sampling", "normalise": True}},
    ("router", "topk"): {
        "groups": {"groups": 2, "keep_groups": 1, "normalise": True, "group_balance": 0.1, "sequence_balance": 0.1},
    },
    ("router", "sigmoid_bias"): {"groups": {"groups": 2, "keep_groups": 1, "scale": 2.5, "balance": 0.1}},
    ("router", "cosine"): {"sigmoid": {"gating": "sigmoid", "dim": 3, "normalise": True, "temperature": 0.5}},
    ("router", "hash"): {"sigmoid": {"gating": "sigmoid", "seed": 3}},
    ("linear", "bitlinear"): {
        "binary": {"weights": "binary", "norm": "layernorm"},
        "outside": {"norm": "none", "act_bits": 4},
    },
    ("linear", "fp8_block"): {"small": {"tile": 12}, "power_of_two": {"tile": 20, "power_of_two": True}},
    ("norm", "layernorm"): {"no_bias": {"bias": False}, "bare": {"gain": False, "bias": False}},
    ("residual", "layer_scale"): {"bare": {"scale": 1e-2, "final": False}},
    ("residual", "pre"): {"unscaled": {"scale_outputs": False}},
    ("residual", "deepnorm"): {"set": {"alpha": 3.0, "beta": 0.5}},
    ("residual", "subln"): {"xavier": {"gamma": 1.0}},
    ("stack", "longmem"): {"default": {"reduction": 1}},
    ("embedding", "token"): {
        "bert": {"types": 2, "norm": "layernorm"},
        "scaled": {"scale": True},
        "sized": {"size": 12, "types": 2, "norm": "layernorm"},
    },
    ("embedding", "patch"): {
        "default": {"image": 8, "patch": 2, "channels": 2},
        "bare": {"image": 8, "patch": 2, "channels": 2, "class_token": False},
        "masked": {"image": 8, "patch": 2, "channels": 2, "mask_token": True, "mean": [0.5], "std": [0.5, 2.0]},
    },
    ("embedding", "vision_language"): {
        "default": {"image": 8, "patch": 4, "channels": 2, "positions": 48},
        "scaled": {"image": 4, "patch": 2, "channels": 1, "positions": 48, "scale": True},
    },
    ("head", "lm"): {"untied": {"tied": False, "bias": True}, "softcap": {"softcap": 5.0, "scale": True}},
    ("head", "mlm"): {"untied": {"tied": False}},
    ("head", "classification"): {
        "mean": {"pool": "mean", "classes": 3},
        "pooler": {"pool": "last", "pooler": True},
        "gelu": {"pooler": True, "activation": "gelu"},
        "patches": {"pool": "patches", "norm": True, "scale": 0.1},
    },
    ("stack", "hysparse"): {  # the defaults are for long sequences and more layers than two
        "default": {"sparse_per_full": 1, "final_full": False, "block": 2, "top_tokens": 4, "window": 3},
        "head_gate": {
            "sparse_per_full": 2,
            "final_full": False,
            "block": 1,
            "top_tokens": 3,
            "window": 2,
            "gate": "head",
        },
        "random": {
            "sparse_per_full": 1,
            "final_full": False,
            "block": 3,
            "top_tokens": 3,
            "window": 4,
            "selection": "random",
        },
    },
    ("stack", "lazy"): {
        "queries_keys": {"reuse": "queries_keys"},
        "single": {"block_size": 1},
    },
    ("stack", "tim"): {  # the defaults are for more layers than two, and an encoder here has one
        "default": {"plain_first": 0, "plain_last": 0},
        "early": {
            "mechanisms": 4,
            "plain_first": 0,
            "plain_last": 1,
            "competition": "scaled",
            "communication": {"heads": 3, "head_dim": 5, "place": "before_ffn"},
        },
        "apart": {"plain_first": 1, "plain_last": 0, "competition": "none", "communication": None},
    },
    ("stack", "multiway"): {"three": {"modalities": 3}},
    ("stack", "multi_token"): {"two": {"predictors": 2, "main": "lazy"}},
    ("head", "token_classification"): {"electra": {"classes": 1, "transform": True}},
    ("stack", "yoco"): {
        "window": {"self_attention": {"kind": "softmax", "heads": 4, "window": 5}},
        "retention": {"self_layers": 1, "self_attention": {"kind": "retention", "heads": 4, "chunk": 3}},
    },
}

EXPERTS: dict[str, dict[str, Any]] = {
    "": {},
    "shared": {"experts": 6, "active": 3, "shared": 2, "hidden": 5},
    "plain": {"gated": False, "activation": "relu", "experts": 6, "active": 3},
    "capacity": {"capacity": 1.0, "shared": 1},
    "all": {"experts": 4, "active": 4},
}
"""Layouts of experts that every router is tried with."""


def layout(router: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Part data of a feed-forward of experts; a token has one expert where the router can choose no more."""
    one = {"active": 1} if router["kind"] == "stable" else {}
    return {"kind": "moe", **VARIANTS["ffn", "moe"]["default"], **fields, **one, "router": router}


def layouts() -> dict[str, dict[str, Any]]:
    """Every variant of every router with every layout of experts that it can choose from, by name."""
    made = {
        f"{name}_{experts}" if experts else name: layout(router, fields)
        for name, router in variants("router").items()
        for experts, fields in EXPERTS.items()
    }
    return {name: fields for name, fields in made.items() if not _illegal(**fields)}


def _illegal(router: dict[str, Any], experts: int, active: int = 2, **rest: Any) -> str | None:
    return validate(resolve("router", router["kind"]), router).illegal(experts, active)  # type: ignore[attr-defined]


def variants(family: str) -> dict[str, dict[str, Any]]:
    """Name -> part data of every variant of every kind of a family; the name of a default is its kind."""
    found = {}
    for kind in kinds(family):
        forms = {"default": {}, **VARIANTS.get((family, kind), {})}
        for name, fields in forms.items():
            found[kind if name == "default" else f"{kind}_{name}"] = {"kind": kind, **fields}
    if family == "ffn":
        # the full product of routers and layouts has tests of its own
        found |= {f"moe_{kind}": layout({"kind": kind}, {}) for kind in kinds("router") if kind != "topk"}
        found["moe_shared"] = layout(variants("router")["sigmoid_bias_groups"], {**EXPERTS["shared"], "experts": 8})
    if family == "position":
        for name, scaling in variants("scaling").items():
            found[f"rotary_{name}"] = {"kind": "rotary", "scaling": scaling}
    return found
