"""What the layouts of TorchScale's assemblies share (Ma et al. 2022, arXiv 2211.13184; microsoft/torchscale).

A config is the keyword arguments of TorchScale's own config class, with `model_type` beside them. TorchScale ignores
keywords that it does not know; here they are refused, as is every option without a place. Options that only say how a
model runs or starts (`fsdp`, `checkpoint_activations`, `flash_attention`, `bert_init`, ...) change nothing of what it
computes and are read over. Dropout of its own is on embeddings and sublayer outputs, and by `activation_dropout` on
hidden units; the backbone's rate is on all of them, so that one must be 0 or the same.

Whether there is a table of positions is an argument of TorchScale's constructors and no option. Here the checkpoint
says it, and without one `no_token_positional_embeddings`, by which name TorchScale's examples have it. The first two
rows of the table stand for no position: they are left out when it is read, and are zeros when it is written.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch

from torchstone.errors import TorchstoneError, nearest
from torchstone.interop.layout import Config, Copy, Layout, Model, Pieces, Rule, Shapes
from torchstone.interop.layouts._shared import After

__all__ = [
    "FREE",
    "KINDS",
    "OPTIONS",
    "RUN_OPTIONS",
    "SKIPPED",
    "TABLE",
    "attention",
    "check_options",
    "experts",
    "ffn",
    "head",
    "norm",
    "one_stack",
    "position",
    "read_dropout",
    "residual",
    "rules",
    "shared",
    "shared_config",
    "side_config",
    "sided",
    "stack",
    "stem_rules",
]

Side = Literal["encoder", "decoder"]

_UNUSED = 2
"""Rows of a table of positions before that of the first token, as fairseq has them."""
RANK = 16
"""Dimensions of the space of `use_xmoe`."""
POLICIES = {"random": "random", "sampling": "sampling", "all": "always"}
"""Their name -> ours."""
ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "swish": "silu"}
"""Their name -> ours."""

# --------------------------------------------------------------------------------------------------------- the options

RUN_OPTIONS = frozenset(
    {
        *("model_type", "architectures", "dtype", "torch_dtype"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
        *("checkpoint_activations", "fsdp", "ddp_rank", "flash_attention", "seq_parallel", "bert_init"),
        *("moe_gating_use_fp32", "max_source_positions", "max_target_positions", "no_token_positional_embeddings"),
    }
)
"""Keys without a meaning for what a model computes, and those that `position` reads."""
OPTIONS = frozenset(
    {
        *("activation_fn", "dropout", "drop_path_rate", "attention_dropout", "activation_dropout"),
        *("no_scale_embedding", "layernorm_embedding", "layernorm_eps", "vocab_size", "no_output_layer"),
        *("deepnorm", "subln", "multiway", "rel_pos_buckets", "max_rel_pos", "xpos_rel_pos", "xpos_scale_base"),
        *("moe_freq", "moe_top1_expert", "moe_expert_count", "moe_eval_capacity_token_fraction", "use_xmoe"),
        *("moe_second_expert_policy", "moe_normalize_gate_prob_before_dropping"),
        *("segment_length", "dilated_ratio"),
    }
)
"""Keys that every config class of TorchScale has, RetNet's aside."""


def sided(side: Side, more: Iterable[str] = ()) -> frozenset[str]:
    """Keys that are about one side."""
    names = ("embed_dim", "attention_heads", "ffn_embed_dim", "layers", "normalize_before", *more)
    return frozenset(f"{side}_{name}" for name in names)


def check_options(config: Config, known: frozenset[str]) -> None:
    """Refuse keys that the assembly has not.

    Raises:
        TorchstoneError: names the key.
    """
    for key in config.values:
        if key not in known and key not in RUN_OPTIONS:
            raise TorchstoneError(
                f"{config.model_type} config: there is no option {key!r}{nearest(key, known | RUN_OPTIONS)}"
            )


def read_dropout(config: Config) -> float:
    """The rate of the backbone.

    Raises:
        TorchstoneError: hidden units have another.
    """
    rate = config.get("dropout", 0.0)
    if config.get("activation_dropout", 0.0) not in (0.0, rate):
        raise TorchstoneError(
            f"{config.model_type} config: activation_dropout {config.values['activation_dropout']!r} is not supported; "
            f"supported: 0.0 or that of dropout, {rate!r}"
        )
    return float(rate)


def residual(config: Config, side: Side, shapes: Shapes | None, inner: bool = True) -> dict[str, Any]:
    """How sublayers are joined, as TorchScale resolves its three switches.

    `deepnorm` makes an encoder post-norm, and `subln`, on without a word, pre-norm. In release 0.3.0 they do the same
    to a decoder; the code after it leaves a decoder as `decoder_normalize_before` says, which without a word is
    pre-norm. The two have one config, but only pre-norm has a last norm, so a decoder's checkpoint says which it is.

    Args:
        config: its values.
        side: whose `normalize_before`.
        shapes: the checkpoint's tensors; None where there is none yet.
        inner: whether `subln` adds norms inside sublayers; in RetNet it adds none.

    Raises:
        TorchstoneError: two theories at once, or Sub-LN in post-norm.
    """
    deepnorm = config.get("deepnorm", False)
    subln = config.get("subln", not deepnorm)
    if deepnorm and subln:
        raise TorchstoneError(
            f"{config.model_type} config: deepnorm True and subln True exclude each other; supported: one of them"
        )
    said = config.get(f"{side}_normalize_before", not deepnorm)
    if side == "encoder":
        before = subln or (said and not deepnorm)
    elif shapes is None:
        before = said
    else:
        before = "layer_norm.weight" in shapes or "decoder.layer_norm.weight" in shapes
    if deepnorm:
        return {"kind": "weighted" if before else "deepnorm"}
    if subln and inner:
        if not before:
            raise TorchstoneError(
                f"{config.model_type} config: {side}_normalize_before False with subln True is not supported; "
                "supported: one of them"
            )
        return {"kind": "subln"}
    return {"kind": "pre" if before else "post"}


def norm(config: Config, eps: float = 1e-5, kind: str = "layernorm") -> dict[str, Any]:
    """The norm everywhere."""
    return {"kind": kind, "eps": config.get("layernorm_eps", eps)}


def ffn(config: Config, side: Side) -> dict[str, Any]:
    """The feed-forward network of one side."""
    activation = config.choose("activation_fn", ACTIVATIONS, "gelu")
    return {"kind": "mlp", "hidden": config.get(f"{side}_ffn_embed_dim", 3072), "activation": activation, "bias": True}


def experts(config: Config, side: Side) -> list[dict[str, Any]]:
    """The patch of one side that puts experts in every so many layers.

    Raises:
        TorchstoneError: a policy or a capacity that the backbone has not.
    """
    every = config.get("moe_freq", 0)
    if not every:
        return []
    both, xmoe = not config.get("moe_top1_expert", False), config.get("use_xmoe", False)
    share = config.get("moe_eval_capacity_token_fraction", 0.25)
    if share <= 0:
        raise TorchstoneError(
            f"{config.model_type} config: moe_eval_capacity_token_fraction {share!r} is not supported; "
            "supported: above 0"
        )
    early = xmoe or config.get("moe_normalize_gate_prob_before_dropping", False)
    policy = "random" if xmoe else config.choose("moe_second_expert_policy", POLICIES, "random")
    network = ffn(config, side)
    router = {"kind": "gshard", "second": policy, "normalise": both and early, "rank": RANK if xmoe else None}
    own = {
        **network,
        "kind": "gshard",
        "experts": config.need("moe_expert_count"),
        "active": 2 if both else 1,
        "gated": False,
        "capacity": 1.0,
        "eval_capacity": None if share >= 1 else share,
        "renormalise": both and not early,
        "router": router,
    }
    at = list(range(every - 1, config.get(f"{side}_layers", 12), every))
    return [{"at": at, "ffn": own}] if at else []


def stack(config: Config) -> dict[str, Any]:
    """A stack by itself: of two modalities with `multiway`, else plain.

    Raises:
        TorchstoneError: experts, or a norm of embeddings, of each modality's own.
    """
    if not config.get("multiway", False):
        return {"kind": "plain"}
    for key in ("moe_freq", "layernorm_embedding"):
        if config.get(key, 0):
            raise TorchstoneError(
                f"{config.model_type} config: {key} {config.values[key]!r} with multiway is not supported; "
                "supported: one of them"
            )
    return {"kind": "multiway", "modalities": 2}


def attention(config: Config, side: Side) -> dict[str, Any]:
    """The attention of one side: dilated in LongNet's classes."""
    heads = config.get(f"{side}_attention_heads", 12)
    name = (config.get("architectures", None) or [""])[0]
    if not name.startswith("LongNet"):
        dropout = config.get("attention_dropout", 0.0)
        return {"kind": "softmax", "heads": heads, "bias": "all", "dropout": dropout}
    config.only("attention_dropout", 0.0)
    return {
        "kind": "dilated",
        "heads": heads,
        "bias": "all",
        "segments": _numbers(config, "segment_length"),
        "dilations": _numbers(config, "dilated_ratio"),
        "offset": "block",
    }


def _numbers(config: Config, key: str) -> list[int]:
    """A list of whole numbers, which TorchScale takes as the text of one."""
    value = given = config.need(key)
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = None
    if not isinstance(value, list | tuple) or not all(isinstance(number, int) for number in value):
        raise TorchstoneError(f"{config.model_type} config: {key} needs a list of whole numbers, got {given!r:.60}")
    return list(value)


def position(
    config: Config, side: Side, shapes: Shapes | None, table: str = "embed_positions.weight"
) -> tuple[dict[str, Any], int]:
    """Position and context of one side.

    Args:
        config: its values.
        side: which.
        shapes: the checkpoint's tensors; None where there is none yet.
        table: what the name of a table of positions ends with.

    Raises:
        TorchstoneError: two kinds at once, or a number of buckets that cannot be shared out.
    """
    rows = config.get("max_source_positions" if side == "encoder" else "max_target_positions", 1024)
    found = None if shapes is None else next((shape for name, shape in shapes.items() if name.endswith(table)), None)
    has_table = found is not None if shapes is not None else not config.get("no_token_positional_embeddings", True)
    if found is not None:
        rows = found[0]
    buckets, far = config.get("rel_pos_buckets", 0), config.get("max_rel_pos", 0)
    kinds: dict[str, dict[str, Any]] = {}
    if has_table:
        kinds["a table of positions"] = {"kind": "learned"}
    if side == "encoder":
        config.only("xpos_rel_pos", False)  # scores that grow without bound towards tokens ahead
    if config.get("xpos_rel_pos", False):
        base = float(config.get("xpos_scale_base", 512))
        kinds["xpos_rel_pos"] = {"kind": "xpos", "scale_base": base, "interleaved": True}
    if buckets > 0 and far > 0:
        if buckets % 8:
            raise TorchstoneError(
                f"{config.model_type} config: rel_pos_buckets {buckets} is not supported; supported: multiples of 8"
            )
        # theirs gives tokens ahead half of the buckets, also where a token sees none
        kinds["rel_pos_buckets"] = {"kind": "t5", "buckets": buckets if side == "encoder" else buckets // 2, "far": far}
    if len(kinds) > 1:
        raise TorchstoneError(
            f"{config.model_type} config: {' with '.join(kinds)} is not supported; supported: one kind of position"
        )
    return next(iter(kinds.values()), {"kind": "none"}), rows - _UNUSED


def head(config: Config, tied: str, shapes: Shapes | None, table: str = "embed_tokens.weight") -> dict[str, Any]:
    """`vocabulary` and `head`. A model without an output layer gets the embedding's matrix for one.

    Args:
        config: its values.
        tied: the option that says whether the output layer is the embedding's matrix.
        shapes: the checkpoint's tensors; None where there is none yet.
        table: what the name of the embedding's matrix ends with.
    """
    vocabulary, names = config.get("vocab_size", -1), {} if shapes is None else shapes
    has_output = vocabulary > 0 and not config.get("no_output_layer", False)
    has_output = has_output or any(name.endswith("output_projection.weight") for name in names)
    if vocabulary <= 0:
        vocabulary = next((shape[0] for name, shape in names.items() if name.endswith(table)), None)
    if vocabulary is None:
        config = Config(config.model_type, {key: value for key, value in config.values.items() if key != "vocab_size"})
        config.need("vocab_size")
    return {"vocabulary": vocabulary, "head": {"kind": "lm", "tied": config.get(tied, False) or not has_output}}


def shared(config: Config, side: Side, eps: float = 1e-5) -> dict[str, Any]:
    """What an assembly of one stack has besides its layers' parts; `eps` is the usual one of its norms."""
    return {
        "causal": side == "decoder",
        "width": config.get(f"{side}_embed_dim", 768),
        "depth": config.get(f"{side}_layers", 12),
        "layers": experts(config, side),
        "dropout": read_dropout(config),
        "drop_path": config.get("drop_path_rate", 0.0),
        "embedding": {"kind": "token", "scale": not config.get("no_scale_embedding", True)},
    }


# ------------------------------------------------------------------------------------------------------------- back


def side_config(model: Model, side: Side) -> dict[str, Any]:
    """The options of one side."""
    layers: tuple[Any, ...] = model.encoder if side == "encoder" else model.decoder
    first, table = layers[0], "max_source_positions" if side == "encoder" else "max_target_positions"
    return {
        f"{side}_embed_dim": model.spec.width,
        f"{side}_attention_heads": first.attention.heads,
        f"{side}_ffn_embed_dim": first.ffn.hidden,
        f"{side}_layers": len(layers),
        f"{side}_normalize_before": first.residual.kind in ("pre", "subln", "weighted"),
        table: model.context + _UNUSED,
    }


def _experts_config(layers: Sequence[Any]) -> dict[str, Any]:
    """The options of experts, of a side's layers."""
    at = [number for number, layer in enumerate(layers) if layer.ffn.kind == "gshard"]
    if not at:
        return {"moe_freq": 0}
    own = layers[at[0]].ffn
    return {
        "moe_freq": at[0] + 1,
        "moe_top1_expert": own.active == 1,
        "moe_expert_count": own.experts,
        "moe_eval_capacity_token_fraction": own.eval_capacity or 1.0,
        "moe_second_expert_policy": next(name for name, ours in POLICIES.items() if ours == own.router.second),
        "moe_normalize_gate_prob_before_dropping": own.router.normalise,
        "use_xmoe": own.router.rank == RANK,
    }


def shared_config(model: Model, side: Side) -> dict[str, Any]:
    """The options that both sides have."""
    layers: tuple[Any, ...] = model.encoder if side == "encoder" else model.decoder
    layer = layers[0]
    embedding: Any = model.spec.embedding
    place: Any = layer.position
    t5 = place.kind == "t5"
    activation = getattr(layer.ffn, "activation", "silu")
    return {
        "vocab_size": model.spec.vocabulary,
        "activation_fn": next((name for name, ours in ACTIVATIONS.items() if ours == activation), activation),
        "dropout": model.spec.dropout,
        "activation_dropout": model.spec.dropout,
        "drop_path_rate": model.spec.drop_path,
        "no_scale_embedding": not embedding.scale,
        "layernorm_embedding": getattr(embedding, "norm", None) is not None,
        "layernorm_eps": layer.norm.eps,
        "deepnorm": layer.residual.kind in ("deepnorm", "weighted"),
        "subln": layer.residual.kind == "subln",
        "no_token_positional_embeddings": place.kind != "learned",
        "rel_pos_buckets": place.buckets * (1 if side == "encoder" else 2) if t5 else 0,
        "max_rel_pos": place.far if t5 else 0,
        "xpos_rel_pos": place.kind == "xpos",
        "xpos_scale_base": place.scale_base if place.kind == "xpos" else 512,
        "multiway": model.spec.stack.kind == "multiway",
        **_experts_config(layers),
    }


# --------------------------------------------------------------------------------------------------------- the table


class _Behind(Pieces):
    """Ours is the first half of theirs: the buckets of tokens behind. Those of tokens ahead, which a decoder never
    reads, are written as zeros."""

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        return super().join(theirs).chunk(2)[0]

    def split(self, ours: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        return [torch.cat([ours, torch.zeros_like(ours)])]

    def shapes(self, ours: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, ...]]:
        return [(2 * ours[0], *ours[1:])]


TABLE = After(_UNUSED)
KINDS: dict[str, tuple[str, ...]] = {
    "attention": ("softmax", "dilated"),
    "position": ("none", "learned", "t5", "xpos"),
    "ffn": ("mlp", "gshard"),
    "router": ("gshard",),
    "residual": ("subln", "deepnorm", "pre", "post", "weighted"),
    "norm": ("layernorm",),
}
SKIPPED = ("*.xpos.scale", "*version")
"""Constants that are kept as buffers, and fairseq's version of a module."""
FREE = frozenset({"context"})


def rules(side: Side, at: str = "") -> tuple[Rule, ...]:
    """The table of one side's layers, positions and last norm; `at` is what their names begin with."""
    layer, ours = f"{at}layers.{{i}}", f"{side}.layers.{{i}}"
    parts = ("q_proj", "k_proj", "v_proj")
    bias = "relative_position" if side == "encoder" else "self_attn_relative_position"
    norms = (
        (f"{ours}.attention.inner_norm", f"{layer}.self_attn.inner_attn_ln"),
        (f"{ours}.attention_residual.norm", f"{layer}.self_attn_layer_norm"),
        (f"{ours}.ffn_residual.norm", f"{layer}.final_layer_norm"),
        (f"{side}.norm", f"{at}layer_norm"),
    )
    return (
        Rule(f"{side}.positions.learned.weight", f"{at}embed_positions.weight", TABLE),
        Rule(
            f"{side}.positions.t5.weight",
            f"{at}{bias}.relative_attention_bias.weight",
            Pieces() if side == "encoder" else _Behind(),
        ),
        # the second of each two is of the modality that the letter stands for
        Rule(f"{ours}.attention.qkv.{{p}}", tuple(f"{layer}.self_attn.{part}.{{p}}" for part in parts)),
        Rule(f"{ours}.attention.qkv.{{p}}", tuple(f"{layer}.self_attn.{part}.{{m}}.{{p}}" for part in parts)),
        Rule(f"{ours}.attention.out.{{p}}", f"{layer}.self_attn.out_proj.{{p}}"),
        Rule(f"{ours}.attention.out.{{p}}", f"{layer}.self_attn.out_proj.{{m}}.{{p}}"),
        *(Rule(f"{name}.{{p}}", f"{theirs}.{{p}}") for name, theirs in norms),
        *(Rule(f"{name}.{n}.{{p}}", f"{theirs}.{m}.{{p}}") for name, theirs in norms for n, m in enumerate("AB")),
        *(
            Rule(f"{ours}.ffn.{name}.{{p}}", f"{layer}.ffn.{theirs}.{{p}}")
            for name, way in (("up", "fc1"), ("down", "fc2"))
            for theirs in (way, f"{{m}}.{way}")
        ),
        Rule(f"{ours}.ffn.inner_norm.{{p}}", f"{layer}.ffn.ffn_layernorm.{{p}}"),
        *(Rule(f"{ours}.ffn.inner_norm.{n}.{{p}}", f"{layer}.ffn.{m}.ffn_layernorm.{{p}}") for n, m in enumerate("AB")),
        Rule(f"{ours}.ffn.router.weight", f"{layer}.moe_layer.gate.wg.weight"),
        Rule(f"{ours}.ffn.router.down", f"{layer}.moe_layer.gate.wg_reduction.weight"),
        Rule(f"{ours}.ffn.router.vectors", f"{layer}.moe_layer.gate.wg"),
        *(
            Rule(f"{ours}.ffn.{name}.weight", f"{layer}.moe_layer.experts.{{e}}.{theirs}")
            for name, theirs in (
                ("up", "fc1.weight"),
                ("up_bias", "fc1.bias"),
                ("inner_gain", "ffn_layernorm.weight"),
                ("inner_bias", "ffn_layernorm.bias"),
                ("down", "fc2.weight"),
                ("down_bias", "fc2.bias"),
            )
        ),
    )


def stem_rules(at: str = "") -> tuple[Rule, ...]:
    """The table of the embedding."""
    return (
        Rule("embedding.weight", f"{at}embed_tokens.weight"),
        Rule("embedding.norm.{p}", f"{at}layernorm_embedding.{{p}}"),
    )


def one_stack(side: Side) -> Layout:
    """The layout of an encoder or a decoder by itself."""
    tied = f"share_{side}_input_output_embed"
    known = OPTIONS | sided(side) | {tied} | ({"normalize_output"} if side == "encoder" else set())
    name = side.capitalize()

    def spec(config: Config, kind: str, shapes: Shapes | None) -> dict[str, Any]:
        check_options(config, known | ({"img_size", "patch_size", "in_chans"} if side == "encoder" else set()))
        body = shared(config, side)
        body["residual"] = residual(config, side, shapes)
        if body["residual"]["kind"] in ("subln", "pre"):
            config.only("normalize_output", True)
        body["position"], body["context"] = position(config, side, shapes)
        body["norm"] = norm(config)
        if side == "encoder":
            body["stack"] = stack(config)
        else:
            config.only("multiway", False)
        if config.get("layernorm_embedding", False):
            body["embedding"]["norm"] = norm(config)
        return {**body, "attention": attention(config, side), "ffn": ffn(config, side), **head(config, tied, shapes)}

    def back(model: Model) -> dict[str, Any]:
        first: Any = (model.encoder if side == "encoder" else model.decoder)[0]
        own_head: Any = model.spec.head
        body = {**side_config(model, side), **shared_config(model, side), tied: own_head.tied}
        return {**body, **_attention_config(first.attention, name)}

    return Layout(
        model_type=f"torchscale-{side}",
        sides=(side,),
        architectures={name: "lm", f"LongNet{name}": "lm"},
        kinds=KINDS | ({"stack": ("plain", "multiway")} if side == "encoder" else {}),
        spec=spec,
        config=back,
        rules=(*stem_rules(), *rules(side)),
        heads={"lm": (Rule("head.out.weight", "output_projection.weight"),)},
        copies=(Copy("output_projection.weight", of="embed_tokens.weight", written=True),),
        skipped=SKIPPED,
        renamed=((f"{side}.", ""),),
        free=FREE,
        hub=False,
    )


def _attention_config(attention: Any, name: str) -> dict[str, Any]:
    if attention.kind != "dilated":
        return {"attention_dropout": attention.dropout}
    return {
        "architectures": [f"LongNet{name}"],
        "flash_attention": True,
        "segment_length": str(list(attention.segments)),
        "dilated_ratio": str(list(attention.dilations)),
    }
