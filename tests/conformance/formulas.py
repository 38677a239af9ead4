"""Parameter counts in closed form, one formula a kind, independent of the modules.

A new kind that has parameters adds its formula here; the test of counts says which is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torchstone.model.stack import LayerSpec
from torchstone.model.transformer import TransformerSpec
from torchstone.spec import PartSpec, resolve

Formula = Callable[..., int]


def _softmax(spec: Any, layer: LayerSpec, D: int, memory: int | None) -> int:
    H, G = spec.heads, spec.kv_heads or spec.heads
    K = spec.head_dim or D // H
    total = D * H * K + 2 * (memory or D) * G * K + H * K * D
    total += H * K * (spec.bias != "none") + G * K * ((spec.bias != "none") + (spec.bias in ("qkv", "all")))
    total += D * (spec.bias in ("qvo", "all"))
    return total + 2 * of(layer.norm)(layer.norm, K) * spec.qk_norm


def _oracle_sparse(spec: Any, layer: LayerSpec, D: int, memory: int | None) -> int:
    return _softmax(spec, layer, D, memory) + D * _gates(spec, D)


def _gates(spec: Any, D: int) -> int:
    """Of both branches."""
    return 2 * spec.heads * ((spec.head_dim or D // spec.heads) if spec.gate == "element" else 1)


def _given_probs(spec: Any, layer: LayerSpec, D: int, memory: int | None) -> int:
    """Values and an output projection; beside a memory a cross-attention like any other."""
    if memory:
        return _softmax(spec, layer, D, memory)
    H, G = spec.heads, spec.kv_heads or spec.heads
    K = spec.head_dim or D // H
    return D * G * K + H * K * D + G * K * (spec.bias != "none") + D * (spec.bias in ("qvo", "all"))


def _retention(spec: Any, layer: LayerSpec, D: int, memory: int | None) -> int:
    E = round(spec.value_expansion * D)
    return 2 * D * D + 3 * D * E


def _shared_kv(spec: Any, layer: LayerSpec, D: int, memory: int | None) -> int:
    H, K = spec.heads, spec.head_dim or D // spec.heads
    bias = H * K * (spec.bias != "none") + D * (spec.bias in ("qvo", "all"))
    return 2 * D * H * K + bias + of(layer.norm)(layer.norm, K) * spec.qk_norm


def _yoco(spec: Any, layers: Sequence[LayerSpec], D: int, V: int) -> int:
    """One norm, keys and values."""
    layer = layers[-1]
    attention: Any = layer.attention
    G, K = attention.kv_heads or attention.heads, attention.head_dim or D // attention.heads
    norms = _before(layer)(layer.norm, D) + of(layer.norm)(layer.norm, K) * attention.qk_norm
    adapted = of(layer.linear)(layer.linear, [(D, G * K, "k"), (D, G * K, "v")])
    return norms + 2 * D * G * K + G * K * sum(attention.biased("k", "v")) + adapted


def _mla(spec: Any, layer: LayerSpec, D: int, memory: int | None) -> int:
    """eqs. 9 to 17: W^DQ and its norm, W^UQ (or W^Q); W^DKV and its norm, W^KR; W^UK, W^UV; W^O."""
    norm, queries = _before(layer), spec.heads * (spec.nope_dim + spec.rope_dim)
    q, C, R = spec.q_latent, spec.kv_latent, spec.rope_dim
    of_q = D * queries if q is None else D * q + norm(layer.norm, q) + q * queries
    of_kv = D * C + norm(layer.norm, C) + D * R + C * spec.heads * (spec.nope_dim + spec.v_dim)
    return of_q + of_kv + spec.heads * spec.v_dim * D


def _router(spec: Any, D: int, E: int, V: int) -> int:
    if spec.kind == "cosine":
        C = spec.dim or max(2, E // 2)
        return C * (D + E) + 1
    if spec.kind == "stable":
        return E * D + spec.dim * (V + E)
    if spec.kind == "gshard" and spec.rank:
        return spec.rank * (D + E)
    return 0 if spec.kind == "hash" and spec.gating == "even" else E * D


def _moe_hidden(spec: Any, D: int) -> int:
    usual = 8 * D / 3 if spec.gated else 4 * D
    return spec.hidden or -(-int(-(-usual // 1)) // (8 * (spec.active + spec.shared))) * 8


def _moe(spec: Any, D: int, V: int) -> int:
    one = (3 if spec.gated else 2) * D * _moe_hidden(spec, D)
    return (spec.experts + spec.shared) * one + of(spec.router)(spec.router, D, spec.experts, V)


def _gshard(spec: Any, D: int, V: int) -> int:
    return _moe(spec, D, V) + spec.experts * spec.bias * (_moe_hidden(spec, D) * (1 + spec.gated) + D)


def _mlp(spec: Any, D: int, V: int = 0) -> int:
    F = spec.hidden or 4 * D
    return 2 * D * F + (F + D) * spec.bias


def _gated(spec: Any, D: int, V: int = 0) -> int:
    F = spec.hidden or (8 * D // 3 + 31) // 32 * 32
    return 3 * D * F + (2 * F + D) * spec.bias


def _tokens(spec: Any, D: int, V: int) -> int:
    E = spec.size or D
    total = (V + spec.types) * E + (of(spec.norm)(spec.norm, E) if spec.norm is not None else 0)
    return total + (E * D + D if E != D else 0)


Projection = tuple[int, int, str]
"""Inputs, outputs and role of a projection or of one slice of a fused one."""


def _of_softmax(spec: Any, D: int, memory: int | None) -> list[Projection]:
    H, G = spec.heads, spec.kv_heads or spec.heads
    K = spec.head_dim or D // H
    source = memory or D
    return [(D, H * K, "q"), (source, G * K, "k"), (source, G * K, "v"), (H * K, D, "out")]


def _of_oracle_sparse(spec: Any, D: int, memory: int | None) -> list[Projection]:
    return [*_of_softmax(spec, D, memory), *[(D, _gates(spec, D) // 2, "gate")] * 2]


def _of_given_probs(spec: Any, D: int, memory: int | None) -> list[Projection]:
    return _of_softmax(spec, D, memory)[0 if memory else 2 :]


def _of_retention(spec: Any, D: int, memory: int | None) -> list[Projection]:
    E = round(spec.value_expansion * D)
    return [(D, D, "q"), (D, D, "k"), (D, E, "v"), (D, E, "gate"), (E, D, "out")]


def _of_gated_retention(spec: Any, D: int, memory: int | None) -> list[Projection]:
    return [*((D, D, role) for role in ("q", "k", "v", "gate", "out")), (D, spec.heads, "gate")]


def _of_shared_kv(spec: Any, D: int, memory: int | None) -> list[Projection]:
    q, _, _, out = _of_softmax(spec, D, memory)
    return [q, out]


def _of_mla(spec: Any, D: int, memory: int | None) -> list[Projection]:
    H, C, q = spec.heads, spec.kv_latent, spec.q_latent
    queries = H * (spec.nope_dim + spec.rope_dim)
    of_q = [(D, queries, "q")] if q is None else [(D, q, "q"), (q, queries, "q")]
    up = [(C, H * spec.nope_dim, "k"), (C, H * spec.v_dim, "v")]
    return [*of_q, (D, C + spec.rope_dim, "k"), *up, (H * spec.v_dim, D, "out")]


def _of_ffn(spec: Any, D: int) -> list[Projection]:
    if spec.kind in ("moe", "gshard"):  # those of shared experts; banks of experts have none of their own
        F = spec.shared * _moe_hidden(spec, D)
        return [(D, F, "up"), (F, D, "down"), *([(D, F, "gate")] if spec.gated else [])] if F else []
    if spec.kind == "multiway":  # banks
        return []
    F = spec.hidden or (4 * D if spec.kind == "mlp" else (8 * D // 3 + 31) // 32 * 32)
    return [(D, F, "up"), (F, D, "down"), *([] if spec.kind == "mlp" else [(D, F, "gate")])]


ATTENTION_PROJECTIONS: dict[str, Callable[[Any, int, int | None], list[Projection]]] = {
    "softmax": _of_softmax,
    "oracle_sparse": _of_oracle_sparse,
    "given_probs": _of_given_probs,
    "retention": _of_retention,
    "gated_retention": _of_gated_retention,
    "shared_kv": _of_shared_kv,
    "mla": _of_mla,
    "dilated": _of_softmax,
}

FORMULAS: dict[tuple[str, str], Formula] = {
    ("attention", "softmax"): _softmax,
    ("attention", "oracle_sparse"): _oracle_sparse,
    ("attention", "given_probs"): _given_probs,
    ("attention", "retention"): _retention,
    ("attention", "gated_retention"): lambda spec, layer, D, memory: 5 * D * D + D * spec.heads,
    ("attention", "shared_kv"): _shared_kv,
    ("attention", "mla"): _mla,
    ("attention", "dilated"): _softmax,
    ("ffn", "mlp"): _mlp,
    ("ffn", "swiglu"): _gated,
    ("ffn", "geglu"): _gated,
    ("ffn", "reglu"): _gated,
    ("ffn", "moe"): _moe,
    ("ffn", "gshard"): _gshard,
    ("ffn", "multiway"): lambda spec, D, V: spec.modalities * _mlp(spec, D, V),
    **{("router", kind): _router for kind in ("topk", "sigmoid_bias", "cosine", "hash", "stable", "gshard")},
    # what a kind adds to the matrices of projections
    ("linear", "dense"): lambda spec, projections: 0,
    ("linear", "lora"): lambda spec, projections: sum(
        spec.rank * (inputs + outputs) for inputs, outputs, role in projections if role in spec.targets
    ),
    ("linear", "bitlinear"): lambda spec, projections: 0,
    ("linear", "fp8_block"): lambda spec, projections: 0,
    ("norm", "rmsnorm"): lambda spec, D: D * spec.gain,
    ("norm", "layernorm"): lambda spec, D: D * (spec.gain + spec.bias),
    # norms around one sublayer, the final one, and those before output projections of all but cross-attentions
    ("residual", "pre"): lambda spec: (1, 1, 0),
    ("residual", "layer_scale"): lambda spec: (1, spec.final, 0),
    ("residual", "post"): lambda spec: (1, 0, 0),
    ("residual", "post_scaled"): lambda spec: (1, 0, 0),
    ("residual", "sandwich"): lambda spec: (2, 1, 0),
    ("residual", "deepnorm"): lambda spec: (1, 0, 0),
    ("residual", "subln"): lambda spec: (1, 1, 1),
    ("residual", "weighted"): lambda spec: (1, 1, 0),
    # joins, attentions, cross-attentions, feed-forwards of a layer with a memory or without
    ("block", "sequential"): lambda spec, memory: (2 + memory, 1, memory, 1),
    ("block", "attention_only"): lambda spec, memory: (1 + memory, 1, memory, 0),
    ("block", "parallel"): lambda spec, memory: (1, 1, 0, 1),
    # once a stack
    ("position", "none"): lambda spec, D, H, context: 0,
    ("position", "alibi"): lambda spec, D, H, context: 0,
    ("position", "rotary"): lambda spec, D, H, context: 0,
    ("position", "xpos"): lambda spec, D, H, context: 0,
    ("position", "sinusoidal"): lambda spec, D, H, context: 0,
    ("position", "learned"): lambda spec, D, H, context: context * D,
    ("position", "t5"): lambda spec, D, H, context: spec.buckets * H,
    ("position", "relative_2d"): lambda spec, D, H, context: ((2 * spec.side - 1) ** 2 + 3 * spec.class_token) * H,
    ("position", "t5_learned"): lambda spec, D, H, context: spec.buckets * H,  # what it adds is counted beside it
    ("embedding", "token"): _tokens,
    ("embedding", "patch"): lambda spec, D, V: (
        spec.channels * spec.patch**2 * D + D + D * spec.class_token + D * spec.mask_token
    ),
    # ids, patches with their bias, class and mask, places of both sides
    ("embedding", "vision_language"): lambda spec, D, V: (
        D * (V + spec.channels * spec.patch**2 + 1 + 2 + 1 + spec.patches + spec.positions)
    ),
    ("head", "lm"): lambda spec, D, V, norm, E: 0 if spec.tied else V * D + V * spec.bias,
    ("head", "mlm"): lambda spec, D, V, norm, E: D * E + E + of(norm)(norm, E) + V + (0 if spec.tied else V * E),
    ("head", "classification"): lambda spec, D, V, norm, E: (
        (D + 1) * spec.classes + (D * D + D) * spec.pooler + of(norm)(norm, D) * spec.norm
    ),
    ("head", "token_classification"): lambda spec, D, V, norm, E: (D + 1) * spec.classes + (D * D + D) * spec.transform,
    # what a stack has besides its layers
    ("stack", "plain"): lambda spec, layers, D, V: 0,
    ("stack", "yoco"): _yoco,
    ("stack", "hysparse"): lambda spec, layers, D, V: 0,
    ("stack", "longmem"): lambda spec, layers, D, V: _side(spec, layers, D, V),
    ("stack", "lazy"): lambda spec, layers, D, V: 0,
    ("stack", "tim"): lambda spec, layers, D, V: 0,
    ("stack", "multi_token"): lambda spec, layers, D, V: _multi_token(spec, layers, D, V),
    ("stack", "multiway"): lambda spec, layers, D, V: 0,
}


def of(spec: PartSpec) -> Formula:
    """The formula of a part's kind."""
    key = (spec.family, spec.kind)
    assert key in FORMULAS, f"{spec.family} {spec.kind} has no formula for its parameters in {__name__}"
    return FORMULAS[key]


def _before(layer: LayerSpec) -> Formula:
    """The formula of a norm before a projection: nothing where that has its own."""
    return (lambda spec, D: 0) if layer.linear.owns_norm else of(layer.norm)


def _around(layer: LayerSpec) -> tuple[int, int]:
    """Norms around one sublayer, and inside, of a layer's residual; projections with a norm of their own take over
    those before them."""
    around, _, inside = of(layer.residual)(layer.residual)
    if not layer.linear.owns_norm:
        return around, inside
    return around - (layer.residual.kind in ("pre", "sandwich", "subln", "weighted", "layer_scale")), 0


def _mechanisms(layer: LayerSpec) -> int:
    """How many stand side by side in a layer."""
    return layer.block.mechanisms if layer.block.kind == "mechanisms" else 1


def of_layer(layer: LayerSpec, D: int, memory: bool, V: int) -> int:
    """Parameters of one layer of width D, whose memory, if it has one, has that width too; of V token ids."""
    if layer.block.kind == "mechanisms":
        return _layer_of_mechanisms(layer, D, memory, V)
    around, inside = _around(layer)
    joins, attentions, crosses, ffns = of(layer.block)(layer.block, memory)
    total = joins * around * of(layer.norm)(layer.norm, D) + _scales(layer, D, memory)
    total += attentions * of(layer.attention)(layer.attention, layer, D, None)
    total += crosses * of(layer.attention)(layer.attention, layer, D, D)
    total += ffns * of(layer.ffn)(layer.ffn, D, V)
    of_attention = ATTENTION_PROJECTIONS[layer.attention.kind]
    projections = attentions * of_attention(layer.attention, D, None) + ffns * _of_ffn(layer.ffn, D)
    written = [inputs for inputs, _, role in projections if role in ("out", "down")]
    written += [_moe_hidden(layer.ffn, D)] * ffns if layer.ffn.kind == "moe" else []  # one for all chosen experts
    written += [_moe_hidden(layer.ffn, D)] * ffns * layer.ffn.experts if layer.ffn.kind == "gshard" else []
    written += [layer.ffn.hidden or 4 * D] * ffns if layer.ffn.kind == "multiway" else []
    total += sum(inside * of(layer.norm)(layer.norm, inputs) for inputs in written)
    projections += crosses * of_attention(layer.attention, D, D)
    return total + of(layer.linear)(layer.linear, projections)


def _scales(layer: LayerSpec, D: int, memory: bool) -> int:
    """Vectors that weigh what sublayers write."""
    return of(layer.block)(layer.block, memory)[0] * D * (layer.residual.kind == "layer_scale")


def _side(spec: Any, layers: Any, D: int, V: int) -> int:
    """A side network: every so many layers one like the last of them, and a gate for each head of one layer."""
    own = layers[spec.reduction - 1 :: spec.reduction]
    return sum(of_layer(layer, D, False, V) for layer in own) + own[spec.beside(len(layers))].attention.heads


def _multi_token(spec: Any, layers: Any, D: int, V: int) -> int:
    """What the main stack has, and in each module two norms, M_k and a layer like the last."""
    layer = layers[-1]
    joined = 2 * D * D + of(layer.linear)(layer.linear, [(2 * D, D, "up")])
    one = 2 * of(layer.norm)(layer.norm, D) + joined + of_layer(layer, D, False, V)
    return of(spec.main)(spec.main, layers, D, V) + spec.predictors * one


def _layer_of_mechanisms(layer: LayerSpec, D: int, memory: bool, V: int) -> int:
    """M layers of width W with their heads and hidden units shared out, M logits, M communications."""
    block: Any = layer.block
    M, W = block.mechanisms, D // block.mechanisms
    fields = {name: layer.attention.dump().get(name) for name in ("heads", "kv_heads", "q_latent", "kv_latent")}
    attention = layer.attention.model_copy(update={name: n // M for name, n in fields.items() if n is not None})
    ffn = layer.ffn.model_copy(update={"hidden": layer.ffn.hidden // M} if layer.ffn.hidden else {})
    one = layer.model_copy(update={"attention": attention, "ffn": ffn, "block": resolve("block", "sequential")()})
    total = M * of_layer(one, W, memory, V) + (D + M) * (block.competition != "none")
    if block.communication is not None:
        E = block.communication.heads * (block.communication.head_dim or min(32, W))
        around, inside = _around(layer)
        adapted = of(layer.linear)(layer.linear, [(W, E, "q"), (W, E, "k"), (W, E, "v"), (E, W, "out")])
        norms = around * of(layer.norm)(layer.norm, W) + inside * of(layer.norm)(layer.norm, E)
        total += M * (4 * W * E + adapted + norms + W * (layer.residual.kind == "layer_scale"))
    return total


def parameters(spec: TransformerSpec) -> int:
    """Parameters of a Transformer whose layers are alike."""
    D, V = spec.width, spec.vocabulary
    E = getattr(spec.embedding, "size", None) or D  # of the vectors, to which positions are added
    total = of(spec.embedding)(spec.embedding, D, V) + of(spec.head)(spec.head, D, V, spec.norm, E)
    for side in ("encoder", "decoder"):
        layers, memory = spec.plan(side), side == "decoder" and spec.encoder is not None
        plan = [planned.spec for planned in spec.stack.plan(layers, D, side == "decoder")] if layers else []
        ways = getattr(spec.stack, "modalities", 1)  # of each projection and norm
        total += ways * sum(of_layer(layer, D, memory, V) for layer in plan)
        if ways > 1:
            total -= (ways - 1) * sum(_scales(layer, D, memory) for layer in plan)
        if plan:
            _, final, _ = of(plan[-1].residual)(plan[-1].residual)
            total += ways * final * of(plan[-1].norm)(plan[-1].norm, D)
            of_stack: Any = spec.stack
            beside = of_stack.predictors if of_stack.kind == "multi_token" else 0
            beside += len(plan) // of_stack.reduction if of_stack.kind == "longmem" else 0
            asking = [*plan, *[plan[-1]] * beside]
            heads = [(_mechanisms(layer), layer.attention.heads, layer.attention.head_size(D)) for layer in asking]
            heads = heads if plan[0].position.scope == "layer" else list(set(heads))  # each sort of heads has a module
            for _, H, _ in heads if plan[0].position.gives == "bias" else [(0, 0, 0)]:
                total += of(plan[0].position)(plan[0].position, E, H, spec.context)
            if (added := plan[0].position.added) not in (None, plan[0].position):
                total += of(added)(added, E, 0, spec.context)
            total += of(spec.stack)(spec.stack, layers, D, V)
    return total
