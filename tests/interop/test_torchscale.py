"""Checkpoints of TorchScale's assemblies: the same outputs as formulas written here give, and as TorchScale itself
gives where it is installed; what has no place is refused by name."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from torchstone.cli.app import app
from torchstone.errors import TorchstoneError
from torchstone.interop.importing import import_run
from torchstone.interop.layout import find_layout
from torchstone.interop.torchscale import from_torchscale
from torchstone.keys import Key
from torchstone.model.embedding.vision_language import VisionLanguage
from torchstone.model.tokens import Tokens
from torchstone.model.transformer import TransformerSpec
from torchstone.spec import validate
from torchstone.train.run import RunFolder

D, H, FF, L, V, T, ROWS = 16, 4, 24, 3, 19, 11, 20
IDS = torch.randint(V, (2, T), generator=Key(3).generator())
SOURCE = torch.randint(V, (2, 7), generator=Key(4).generator())
VALID = torch.arange(T) < torch.tensor([[T], [7]])
Tensors = dict[str, torch.Tensor]
SPLIT, WAY = 5, "?"
"""Tokens of the first of two modalities, and where their letter stands in a name."""
MODALITY = (torch.arange(T) >= SPLIT).long()[None]


def sizes(*sides: str) -> dict[str, Any]:
    """Config values of a tiny model."""
    names = {"embed_dim": D, "attention_heads": H, "ffn_embed_dim": FF, "layers": L}
    return {"vocab_size": V, **{f"{side}_{name}": value for side in sides for name, value in names.items()}}


RETNET: dict[str, Any] = {
    **{"vocab_size": V, "decoder_embed_dim": D, "decoder_value_embed_dim": 40, "decoder_retention_heads": 2},
    **{"decoder_ffn_embed_dim": FF, "decoder_layers": L},
}

# ----------------------------------------------------------------------------------- TorchScale's names, and formulas


class Names:
    """Shapes by name, filled in the order in which they are asked for."""

    def __init__(self) -> None:
        self.tensors: Tensors = {}
        self.generator = Key(1).generator()

    def matrix(self, name: str, out: int, inputs: int, bias: bool = True) -> None:
        self.tensors[f"{name}.weight"] = 0.3 * torch.randn(out, inputs, generator=self.generator)
        if bias:
            self.tensors[f"{name}.bias"] = 0.3 * torch.randn(out, generator=self.generator)

    def norm(self, name: str, width: int, bias: bool = True) -> None:
        self.tensors[f"{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=self.generator)
        if bias:
            self.tensors[f"{name}.bias"] = 0.3 * torch.randn(width, generator=self.generator)

    def double(self) -> None:
        """All but embeddings once more, under other letters: A and B."""
        for name in [name for name in self.tensors if not name.startswith("embed")]:
            module, _, end = name.rpartition(".")
            for letter in "AB":
                network, _, last = module.rpartition(".")
                renamed = f"{network}.{letter}.{last}" if network.endswith("ffn") else f"{module}.{letter}"
                drawn = 0.1 * torch.randn(self.tensors[name].shape, generator=self.generator)
                self.tensors[f"{renamed}.{end}"] = self.tensors[name] + drawn
            del self.tensors[name]


def side_names(names: Names, side: str, config: dict[str, Any], at: str, cross: bool) -> None:
    """Tensors of TorchScale's `Encoder` or `Decoder`."""
    subln = config.get("subln", not config.get("deepnorm", False))
    names.matrix(f"{at}embed_tokens", V, D, bias=False)
    if config.get("table"):
        names.matrix(f"{at}embed_positions", ROWS, D, bias=False)
    if config.get("layernorm_embedding"):
        names.norm(f"{at}layernorm_embedding", D)
    for i in range(L):
        layer = f"{at}layers.{i}"
        for attention in ("self_attn", *(("encoder_attn",) if cross else ())):
            for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
                names.matrix(f"{layer}.{attention}.{part}", D, D)
            names.norm(f"{layer}.{attention}_layer_norm", D)
        if subln:
            names.norm(f"{layer}.self_attn.inner_attn_ln", D)
        every, networks = config.get("moe_freq", 0), [f"{layer}.ffn"]
        if every and (i + 1) % every == 0:
            E, gate = config["moe_expert_count"], f"{layer}.moe_layer.gate"
            networks = [f"{layer}.moe_layer.experts.{e}" for e in range(E)]
            if config.get("use_xmoe"):
                names.matrix(f"{gate}.wg_reduction", 16, D, bias=False)
                names.matrix(f"{gate}.wg", E, 16, bias=False)
                names.tensors[f"{gate}.wg"] = names.tensors.pop(f"{gate}.wg.weight")
            else:
                names.matrix(f"{gate}.wg", E, D, bias=False)
        for network in networks:
            names.matrix(f"{network}.fc1", FF, D)
            names.matrix(f"{network}.fc2", D, FF)
            if subln:
                names.norm(f"{network}.ffn_layernorm", FF)
        names.norm(f"{layer}.final_layer_norm", D)
    if before(config, side):
        names.norm(f"{at}layer_norm", D)
    if config.get("multiway"):
        names.double()
    if config.get("rel_pos_buckets"):
        table = "relative_position" if side == "encoder" else "self_attn_relative_position"
        names.matrix(f"{at}{table}.relative_attention_bias", config["rel_pos_buckets"], H, bias=False)


def before(config: dict[str, Any], side: str) -> bool:
    """Whether norms stand before sublayers, in the code after release 0.3.0: its two switches overrule the option in
    encoders alone."""
    deepnorm = config.get("deepnorm", False)
    if side == "encoder" and (deepnorm or config.get("subln", True)):
        return not deepnorm
    return config.get(f"{side}_normalize_before", True)


def weight(side: str, config: dict[str, Any], both: bool) -> float:
    """DeepNorm's weight of the skip."""
    if not config.get("deepnorm"):
        return 1.0
    if not both:
        return (2 * L) ** 0.25
    return 0.81 * (L**4 * L) ** (1 / 16) if side == "encoder" else (3 * L) ** 0.25


def both_ways(x: torch.Tensor, t: Tensors, name: str, of: Any) -> torch.Tensor:
    """The first tokens by what is called A, and the rest by B."""
    first, rest = of(x[:, :SPLIT], name.replace(WAY, "A")), of(x[:, SPLIT:], name.replace(WAY, "B"))
    return torch.cat([first, rest], 1)


def way(t: Tensors, name: str) -> str:
    """A module's name, or where it stands twice a name with a place for the letter."""
    parts = name.split(".")
    twice = (".".join([*parts[:n], WAY, *parts[n:]]) for n in (len(parts), len(parts) - 1))
    return next((one for one in twice if f"{one.replace(WAY, 'A')}.weight" in t), name)


def linear(x: torch.Tensor, t: Tensors, name: str) -> torch.Tensor:
    if WAY in (twice := way(t, name)):
        return both_ways(x, t, twice, lambda part, one: linear(part, t, one))
    return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", torch.zeros(()))


def normed(x: torch.Tensor, t: Tensors, name: str, eps: float) -> torch.Tensor:
    if WAY in (twice := way(t, name)):
        return both_ways(x, t, twice, lambda part, one: normed(part, t, one, eps))
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * t[f"{name}.weight"] + t[f"{name}.bias"]


def rms(x: torch.Tensor, gain: torch.Tensor | float, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def turned(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Channels (2i, 2i + 1) turned by the angle of pair i."""
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], -1).flatten(-2)


def xpos_scores(q: torch.Tensor, k: torch.Tensor, base: float) -> torch.Tensor:
    """Scores pair by pair: zeta_i^((n - m) / base) of the turned product."""
    K = q.shape[-1]
    even = torch.arange(0, K, 2)
    where = torch.arange(q.shape[-2], dtype=torch.float32)[:, None]
    angle = where * 10000.0 ** (-even / K)
    q, k = turned(q, angle), turned(k, angle)
    zeta = (even + 0.4 * K) / (1.4 * K)
    fade = zeta ** ((where - where.T)[..., None] / base)
    pairs = (q[..., :, None, :] * k[..., None, :, :]).unflatten(-1, (K // 2, 2)).sum(-1)
    return (pairs * fade).sum(-1)


def t5_bias(table: torch.Tensor, ahead: torch.Tensor, far: int) -> torch.Tensor:
    """(H, T, S): buckets of both directions, half of them each, whatever the mask is."""
    half = table.shape[0] // 2
    exact, bias = half // 2, torch.zeros(table.shape[1], *ahead.shape)
    for n in range(ahead.shape[0]):
        for m in range(ahead.shape[1]):
            step = int(ahead[n, m])
            size = abs(step)
            if size >= exact:
                size = min(half - 1, exact + int(math.log(size / exact) / math.log(far / exact) * (half - exact)))
            bias[:, n, m] = table[size + (half if step > 0 else 0)]
    return bias


def attended(
    t: Tensors, name: str, x: torch.Tensor, memory: torch.Tensor, seen: torch.Tensor, config: dict[str, Any], bias: Any
) -> torch.Tensor:
    """Multi-head attention of x to the memory; `seen` (B|1, T, S) says who sees whom."""
    q, k, v = (
        linear(y, t, f"{name}.{part}_proj").unflatten(-1, (H, -1)).transpose(1, 2)
        for part, y in (("q", x), ("k", memory), ("v", memory))
    )
    if config.get("xpos_rel_pos") and name.endswith("self_attn"):
        scores = xpos_scores(q, k, config["xpos_scale_base"])
    else:
        scores = q @ k.transpose(-1, -2)
    scores = scores / (D // H) ** 0.5 + (0 if bias is None else bias)
    y = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1) @ v
    y = y.transpose(1, 2).flatten(-2)
    if f"{way(t, f'{name}.inner_attn_ln').replace(WAY, 'A')}.weight" in t:
        y = normed(y, t, f"{name}.inner_attn_ln", config.get("layernorm_eps", 1e-5))
    return linear(y, t, f"{name}.out_proj")


def mixed(h: torch.Tensor, t: Tensors, name: str, config: dict[str, Any], network: Any) -> torch.Tensor:
    """A layer of experts, token by token: all first choices find their place before any second one, in the order of
    columns and then of rows."""
    both, E = not config.get("moe_top1_expert", False), config["moe_expert_count"]
    if config.get("use_xmoe"):
        vectors = t[f"{name}.gate.wg"]
        scores = h @ t[f"{name}.gate.wg_reduction.weight"].T @ (vectors / vectors.norm(dim=1, keepdim=True)).T
    else:
        scores = h @ t[f"{name}.gate.wg.weight"].T
    gates, experts = scores.softmax(-1).topk(2 if both else 1)
    early = both and (config.get("use_xmoe") or config.get("moe_normalize_gate_prob_before_dropping", False))
    gates = gates / gates.sum(-1, keepdim=True) if early else gates.clone()
    room = math.ceil(config.get("moe_eval_capacity_token_fraction", 0.25) * h[..., 0].numel())
    taken = [0] * E
    for k in range(gates.shape[-1]):
        for column in range(h.shape[1]):
            for row in range(h.shape[0]):
                e = int(experts[row, column, k])
                gates[row, column, k] *= taken[e] < room
                taken[e] += 1
    if both and not early:
        gates = gates / gates.sum(-1, keepdim=True).clamp(min=1e-7)
    y = torch.zeros_like(h)
    for e in range(E):
        share = torch.where(experts == e, gates, 0.0).sum(-1, keepdim=True)
        y = y + share * network(h, f"{name}.experts.{e}")
    return y


def run_side(
    t: Tensors,
    side: str,
    config: dict[str, Any],
    ids: torch.Tensor,
    at: str = "",
    memory: torch.Tensor | None = None,
    both: bool = False,
    valid: torch.Tensor | None = None,
    embedded: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hidden states of TorchScale's `Encoder` or `Decoder`; `embedded` takes the place of ids and their positions."""
    eps, alpha, pre = config.get("layernorm_eps", 1e-5), weight(side, config, both), before(config, side)
    act = {"gelu": F.gelu, "relu": F.relu, "swish": F.silu}[config.get("activation_fn", "gelu")]
    if embedded is None:
        x = t[f"{at}embed_tokens.weight"][ids] * (1.0 if config.get("no_scale_embedding", True) else D**0.5)
    else:
        x = embedded
    if f"{at}embed_positions.weight" in t:
        x = x + t[f"{at}embed_positions.weight"][2 : 2 + ids.shape[1]]
    if f"{at}layernorm_embedding.weight" in t:
        x = normed(x, t, f"{at}layernorm_embedding", eps)
    ahead = torch.arange(x.shape[1])[None, :] - torch.arange(x.shape[1])[:, None]
    seen = (ahead <= 0)[None] if side == "decoder" else torch.ones_like(ahead, dtype=torch.bool)[None]
    seen = seen if valid is None else seen & valid[:, None]
    table = t.get(f"{at}{'relative_position' if side == 'encoder' else 'self_attn_relative_position'}"
                  ".relative_attention_bias.weight")  # fmt: skip
    bias = None if table is None else t5_bias(table, ahead, config["max_rel_pos"])

    def around(x: torch.Tensor, name: str, sublayer: Any) -> torch.Tensor:
        y = alpha * x + sublayer(normed(x, t, name, eps) if pre else x)
        return y if pre else normed(y, t, name, eps)

    def network(h: torch.Tensor, name: str) -> torch.Tensor:
        h = act(linear(h, t, f"{name}.fc1"))
        if f"{way(t, f'{name}.ffn_layernorm').replace(WAY, 'A')}.weight" in t:
            h = normed(h, t, f"{name}.ffn_layernorm", eps)
        return linear(h, t, f"{name}.fc2")

    def through(x: torch.Tensor, layer: str) -> torch.Tensor:
        own, cross = f"{layer}.self_attn", f"{layer}.encoder_attn"
        x = around(x, f"{own}_layer_norm", lambda h: attended(t, own, h, h, seen, config, bias))
        if memory is not None:
            everything = torch.ones(1, ids.shape[1], memory.shape[1], dtype=torch.bool)
            x = around(x, f"{cross}_layer_norm", lambda h: attended(t, cross, h, memory, everything, config, None))
        if f"{layer}.moe_layer.experts.0.fc1.weight" not in t:
            return around(x, f"{layer}.final_layer_norm", lambda h: network(h, f"{layer}.ffn"))
        name = f"{layer}.moe_layer"
        return around(x, f"{layer}.final_layer_norm", lambda h: mixed(h, t, name, config, network))

    for i in range(L):
        x = through(x, f"{at}layers.{i}")
    return normed(x, t, f"{at}layer_norm", eps) if pre else x


def run_retnet(t: Tensors, config: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Logits of TorchScale's `RetNetDecoder`, as one product over all pairs."""
    heads, eps = config["decoder_retention_heads"], 1e-6
    alpha = weight("decoder", config, both=False)
    pre = config.get("decoder_normalize_before", True)
    act = {"gelu": F.gelu, "swish": F.silu, "relu": F.relu}[config.get("activation_fn", "gelu")]
    pairs = D // heads // 2
    where = torch.arange(ids.shape[1], dtype=torch.float32)
    angle = where[:, None] * 10000.0 ** -torch.linspace(0, 1, pairs)
    decay = 1 - 2.0 ** (-5 - torch.arange(heads))[:, None, None]
    lag = where[:, None] - where
    fade = torch.where(lag >= 0, decay ** lag.clamp(min=0), 0.0)
    fade = fade / fade.sum(-1, keepdim=True).sqrt()
    x = t["embed_tokens.weight"][ids] * (1.0 if config.get("no_scale_embedding", True) else D**0.5)
    if "layernorm_embedding.weight" in t:
        x = rms(x, t["layernorm_embedding.weight"], eps)

    def around(x: torch.Tensor, name: str, sublayer: Any) -> torch.Tensor:
        y = alpha * x + sublayer(rms(x, t[f"{name}.weight"], eps) if pre else x)
        return y if pre else rms(y, t[f"{name}.weight"], eps)

    def retained(h: torch.Tensor, name: str) -> torch.Tensor:
        q, k, v, g = (linear(h, t, f"{name}.{part}_proj") for part in "qkvg")
        q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
        scores = turned(q, angle) @ turned(k, angle).transpose(-1, -2) * (D // heads) ** -0.5 * fade
        scores = scores / scores.abs().sum(-1, keepdim=True).clamp(min=1, max=5e4)
        y = rms(scores @ v, 1.0, eps).transpose(1, 2).flatten(-2)
        return linear(F.silu(g) * y, t, f"{name}.out_proj")

    def fed(h: torch.Tensor, name: str) -> torch.Tensor:
        return linear(act(linear(h, t, f"{name}.fc1")) * linear(h, t, f"{name}.gate"), t, f"{name}.fc2")

    def through(x: torch.Tensor, layer: str) -> torch.Tensor:
        x = around(x, f"{layer}.retention_layer_norm", lambda h: retained(h, f"{layer}.retention"))
        return around(x, f"{layer}.final_layer_norm", lambda h: fed(h, f"{layer}.ffn"))

    for i in range(L):
        x = through(x, f"layers.{i}")
    x = rms(x, t["layer_norm.weight"], eps) if pre else x
    return linear(x, t, "output_projection")


def retnet_names(config: dict[str, Any]) -> Tensors:
    names, values = Names(), config["decoder_value_embed_dim"]
    names.matrix("embed_tokens", V, D, bias=False)
    if config.get("layernorm_embedding"):
        names.norm("layernorm_embedding", D, bias=False)
    for i in range(L):
        for part, out, inputs in (("q", D, D), ("k", D, D), ("v", values, D), ("g", values, D), ("out", D, values)):
            names.matrix(f"layers.{i}.retention.{part}_proj", out, inputs, bias=False)
        names.norm(f"layers.{i}.retention_layer_norm", D, bias=False)
        for part, out, inputs in (("fc1", FF, D), ("fc2", D, FF), ("gate", FF, D)):
            names.matrix(f"layers.{i}.ffn.{part}", out, inputs, bias=False)
        names.norm(f"layers.{i}.final_layer_norm", D, bias=False)
    if config.get("decoder_normalize_before", True):
        names.norm("layer_norm", D, bias=False)
    names.matrix("output_projection", V, D, bias=False)
    names.tensors |= {"retnet_rel_pos.angle": torch.ones(8), "retnet_rel_pos.decay": torch.ones(2)}
    return names.tensors


def one_stack(side: str, config: dict[str, Any]) -> Tensors:
    names = Names()
    side_names(names, side, config, "", cross=False)
    names.matrix("output_projection", V, D, bias=False)
    if config.get(f"share_{side}_input_output_embed"):
        names.tensors["output_projection.weight"] = names.tensors["embed_tokens.weight"]
    if config.get("xpos_rel_pos"):
        names.tensors |= {f"layers.{i}.self_attn.xpos.scale": torch.ones(2) for i in range(L)}
    return names.tensors


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found / wanted.abs().max(), wanted / wanted.abs().max(), rtol=1e-5, atol=1e-5)


def asked(config: dict[str, Any]) -> dict[str, Any]:
    """The config as a user has it: whether there is a table of positions is no option."""
    return {key: value for key, value in config.items() if key != "table"}


# -------------------------------------------------------------------------------------------------- the same outputs

COMMON: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "pre": {"subln": False},
    "deepnorm": {"deepnorm": True},
    "t5": {"rel_pos_buckets": 16, "max_rel_pos": 9},
    "embedding": {"no_scale_embedding": False, "layernorm_embedding": True, "layernorm_eps": 1e-3},
    "table": {"table": True, "activation_fn": "relu"},
    "swish": {"activation_fn": "swish"},
    "top-2": {"moe_freq": 2, "moe_expert_count": 4, "moe_second_expert_policy": "all"},
    "top-1": {"moe_freq": 1, "moe_expert_count": 3, "moe_top1_expert": True, "subln": False},
    "x-moe": {
        **{"moe_freq": 3, "moe_expert_count": 4, "use_xmoe": True, "moe_top1_expert": True},
        **{"moe_eval_capacity_token_fraction": 1.0},
    },
}
EARLY = {"moe_normalize_gate_prob_before_dropping": True, "moe_second_expert_policy": "all"}
STACKS = {
    "decoder": {
        **COMMON,
        "post": {"subln": False, "decoder_normalize_before": False},
        "deepnorm in post-norm": {"deepnorm": True, "decoder_normalize_before": False},
        "xpos": {"xpos_rel_pos": True, "xpos_scale_base": 8},
        "tied": {"share_decoder_input_output_embed": True},
        "normalised early": {**COMMON["top-2"], **EARLY},
    },
    "encoder": {
        **COMMON,
        "post": {"subln": False, "encoder_normalize_before": False},
        "tied": {"share_encoder_input_output_embed": True},
        "multiway": {"multiway": True, "table": True},
        "multiway in post-norm": {"multiway": True, "deepnorm": True, "rel_pos_buckets": 16, "max_rel_pos": 9},
    },
}


@pytest.mark.parametrize(("side", "case"), [(side, case) for side in STACKS for case in STACKS[side]])
@torch.no_grad()
def test_an_encoder_or_a_decoder_gives_what_the_formulas_give(side: Any, case: str) -> None:
    config = {**sizes(side), **STACKS[side][case]}
    tensors = one_stack(side, config)
    model = from_torchscale(side, asked(config), tensors)
    valid = VALID if side == "encoder" and "moe_freq" not in config else None
    hidden = run_side(tensors, side, config, IDS, valid=valid)
    wanted = linear(hidden, tensors, "output_projection")
    modality = MODALITY if config.get("multiway") else None
    found = model(IDS if valid is None else Tokens.of(IDS, valid=valid, modality=modality)).logits
    same(*((found, wanted) if valid is None else (found[valid], wanted[valid])))


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"subln": False},
        {"deepnorm": True},
        {"deepnorm": True, "decoder_normalize_before": False},
        {"subln": False, "encoder_normalize_before": False, "decoder_normalize_before": False},
        {"table": True},
    ],
    ids=["as it comes", "pre", "deepnorm", "deepnorm in post-norm", "post", "table"],
)
@torch.no_grad()
def test_an_encoder_decoder_gives_what_the_formulas_give(case: dict[str, Any]) -> None:
    config = {**sizes("encoder", "decoder"), "share_all_embeddings": True, **case}
    names = Names()
    side_names(names, "encoder", config, "encoder.", cross=False)
    side_names(names, "decoder", config, "decoder.", cross=True)
    tensors = names.tensors
    for copy in ("decoder.embed_tokens", "decoder.output_projection"):
        tensors[f"{copy}.weight"] = tensors["encoder.embed_tokens.weight"]
    memory = run_side(tensors, "encoder", config, SOURCE, "encoder.", both=True)
    hidden = run_side(tensors, "decoder", config, IDS, "decoder.", memory, both=True)
    model = from_torchscale("encoder-decoder", asked(config), tensors)
    same(model(IDS, memory=SOURCE).logits, linear(hidden, tensors, "decoder.output_projection"))


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"deepnorm": True},
        {"subln": False, "decoder_normalize_before": False, "activation_fn": "swish"},
        {"layernorm_embedding": True, "no_scale_embedding": False, "activation_fn": "relu"},
    ],
    ids=["as it comes", "deepnorm", "post", "embedding"],
)
@torch.no_grad()
def test_a_retnet_gives_what_the_formulas_give(case: dict[str, Any]) -> None:
    config = {**RETNET, **case}
    tensors = retnet_names(config)
    model = from_torchscale("retnet", config, tensors)
    same(model(IDS).logits, run_retnet(tensors, config, IDS))


@torch.no_grad()
def test_a_longnet_whose_segments_hold_everything_is_a_decoder() -> None:
    # one pattern of dilation 1 over the whole row; patterns themselves: tests of attention dilated
    config = sizes("decoder")
    tensors = one_stack("decoder", config)
    longnet = {"architectures": ["LongNetDecoder"], "segment_length": "[64]", "dilated_ratio": "[1]"}
    wanted = linear(run_side(tensors, "decoder", config, IDS), tensors, "output_projection")
    same(from_torchscale("decoder", {**config, **longnet}, tensors)(IDS).logits, wanted)
    spec = find_layout("torchscale-decoder").to_spec(
        {**config, **longnet, "segment_length": [4, 8], "dilated_ratio": "(1, 2)"}
    )
    assert spec["attention"] == {
        **{"kind": "dilated", "heads": H, "bias": "all", "offset": "block"},
        **{"segments": [4, 8], "dilations": [1, 2]},
    }


@pytest.mark.parametrize("side", STACKS)
@torch.no_grad()
def test_without_an_output_layer_there_are_hidden_states(side: Any) -> None:
    config = {**sizes(side), "vocab_size": -1}
    tensors = one_stack(side, config)
    del tensors["output_projection.weight"]
    same(from_torchscale(side, config, tensors)(IDS, outputs="none").hidden, run_side(tensors, side, config, IDS))


def test_a_last_norm_tells_which_version_of_torchscale_made_a_decoder() -> None:
    config = {**sizes("decoder"), "deepnorm": True}
    later = one_stack("decoder", config)
    release = {name: tensor for name, tensor in later.items() if not name.startswith("layer_norm.")}
    kinds = [from_torchscale("decoder", config, tensors).spec.residual.kind for tensors in (later, release)]
    assert kinds == ["weighted", "deepnorm"]
    assert find_layout("torchscale-decoder").to_spec(config)["residual"] == {"kind": "deepnorm"}


# ----------------------------------------------------------------------------------------------------- and back


@pytest.mark.parametrize(("side", "case"), [(side, case) for side in STACKS for case in STACKS[side]])
def test_what_was_read_is_written_again(side: Any, case: str) -> None:
    config = {**sizes(side), **STACKS[side][case]}
    tensors = one_stack(side, config)
    model = from_torchscale(side, asked(config), tensors)
    layout = find_layout(f"torchscale-{side}")
    written, back = layout.to_config(model.spec), layout.to_theirs(model.state_dict(), model.spec)
    constants = {name for name in tensors if name.endswith("xpos.scale")}
    assert set(back) == set(tensors) - constants
    for name, tensor in back.items():
        used = slice(2, None) if name == "embed_positions.weight" else slice(None)
        if name.startswith("self_attn_relative_position"):
            used = slice(tensor.shape[0] // 2)
        assert torch.equal(tensor[used], tensors[name][used]), name
    assert {key: written[key] for key in asked(config)} == asked(config)
    again = layout.to_spec(written, {name: tuple(tensor.shape) for name, tensor in back.items()})
    assert validate(TransformerSpec, again).dump() == model.spec.dump()


def test_a_retnet_and_an_encoder_decoder_are_written_again() -> None:
    tensors = retnet_names(RETNET)
    model = from_torchscale("retnet", RETNET, tensors)
    layout = find_layout("torchscale-retnet")
    assert {key: layout.to_config(model.spec)[key] for key in RETNET} == RETNET
    back = layout.to_theirs(model.state_dict(), model.spec)
    assert set(tensors) - set(back) == {"retnet_rel_pos.angle", "retnet_rel_pos.decay"}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in back.items())
    config = {**sizes("encoder", "decoder"), "encoder_layers": 2, "share_all_embeddings": True}
    layout = find_layout("torchscale-encoder-decoder")
    spec = validate(TransformerSpec, layout.to_spec(config))
    written = layout.to_config(spec)
    assert {key: written[key] for key in config} == config
    shapes = dict(layout.write(spec, {n: p.detach() for n, p in spec.build().state_dict().items()}.__getitem__))
    copies = [
        f"{name}.weight" for name in ("decoder.embed_tokens", "decoder.output_projection", "encoder.embed_tokens")
    ]
    assert [name for name in sorted(shapes) if "embed_tokens" in name or "output" in name] == copies


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("assembly", "change", "message"),
    [
        ("decoder", {"decoder_layer": 3}, "there is no option 'decoder_layer' (did you mean 'decoder_layers'?)"),
        ("decoder", {"encoder_layers": 3}, "there is no option 'encoder_layers' (did you mean 'decoder_layers'?)"),
        ("decoder", {"deepnorm": True, "subln": True},
         "deepnorm True and subln True exclude each other; supported: one of them"),
        ("decoder", {"decoder_normalize_before": False},
         "decoder_normalize_before False with subln True is not supported; supported: one of them"),
        ("decoder", {"multiway": True}, "multiway True is not supported; supported: False"),
        ("encoder", {"moe_freq": 2}, "moe_expert_count is required"),
        ("decoder", {"moe_freq": 2, "moe_expert_count": 4, "moe_second_expert_policy": "none"},
         "moe_second_expert_policy 'none' is not supported; supported: random, sampling, all"),
        ("decoder", {"moe_freq": 2, "moe_expert_count": 4, "moe_eval_capacity_token_fraction": -1.0},
         "moe_eval_capacity_token_fraction -1.0 is not supported; supported: above 0"),
        ("retnet", {"moe_freq": 2}, "moe_freq 2 is not supported; supported: 0"),
        ("encoder", {"xpos_rel_pos": True}, "xpos_rel_pos True is not supported; supported: False"),
        ("encoder", {"normalize_output": False}, "normalize_output False is not supported; supported: True"),
        ("encoder", {"rel_pos_buckets": 12, "max_rel_pos": 9},
         "rel_pos_buckets 12 is not supported; supported: multiples of 8"),
        ("decoder", {"xpos_rel_pos": True, "no_token_positional_embeddings": False},
         "a table of positions with xpos_rel_pos is not supported; supported: one kind of position"),
        ("decoder", {"activation_fn": "tanh"},
         "activation_fn 'tanh' is not supported; supported: gelu, relu, swish"),
        ("decoder", {"dropout": 0.1, "activation_dropout": 0.2},
         "activation_dropout 0.2 is not supported; supported: 0.0 or that of dropout, 0.1"),
        ("decoder", {"vocab_size": None}, "vocab_size is required"),
        ("decoder", {"architectures": ["LongNetDecoder"], "segment_length": "os.getcwd()"},
         "segment_length needs a list of whole numbers, got 'os.getcwd()'"),
        ("encoder-decoder", {"share_all_embeddings": False},
         "share_all_embeddings False is not supported; supported: True"),
        ("encoder-decoder", {"rel_pos_buckets": 32}, "rel_pos_buckets 32 is not supported; supported: 0"),
        ("encoder-decoder", {"encoder_embed_dim": 8},
         "encoder_embed_dim 8 is not supported; supported: that of decoder_embed_dim, 16"),
        ("encoder-decoder", {"no_token_positional_embeddings": False, "max_source_positions": 12},
         "max_source_positions 12 beside max_target_positions 1024 is not supported; supported: tables of one length "
         "on both sides"),
        ("retnet", {"attention_dropout": 0.1}, "there is no option 'attention_dropout' (did you mean "
         "'activation_dropout'?)"),
    ],
)  # fmt: skip
def test_an_option_without_a_place_is_refused_by_name(assembly: str, change: dict[str, Any], message: str) -> None:
    usual = {"retnet": RETNET, "encoder-decoder": {**sizes("encoder", "decoder"), "share_all_embeddings": True}}
    config = usual.get(assembly, sizes(assembly))
    with pytest.raises(TorchstoneError) as caught:
        find_layout(f"torchscale-{assembly}").to_spec({**config, **change})
    assert str(caught.value) == f"torchscale-{assembly} config: {message}"


def test_tensors_that_do_not_fit_are_named() -> None:
    config = sizes("decoder")
    tensors = one_stack("decoder", config)
    with pytest.raises(TorchstoneError) as caught:
        from_torchscale("decoder", {**config, "subln": False}, tensors)
    assert str(caught.value) == (
        "torchscale-decoder checkpoint: surplus layers.{0,1,2}.self_attn.inner_attn_ln.weight, "
        "layers.{0,1,2}.self_attn.inner_attn_ln.bias, layers.{0,1,2}.ffn.ffn_layernorm.weight, "
        "layers.{0,1,2}.ffn.ffn_layernorm.bias"
    )


# ------------------------------------------------------------------------------------------------------ files and runs


@torch.no_grad()
def test_a_file_of_torch_save_becomes_a_run(tmp_path: Path) -> None:
    config = sizes("decoder")
    tensors = one_stack("decoder", config)
    fairseq = {"model": {f"decoder.{name}": tensor for name, tensor in tensors.items()}, "extra": {"epoch": 1}}
    torch.save(fairseq, tmp_path / "weights.pt")
    (tmp_path / "values.json").write_text(json.dumps(config))
    command = ["import", str(tmp_path / "weights.pt"), "--layout", "torchscale-decoder", "--config"]
    result = CliRunner().invoke(app, [*command, str(tmp_path / "values.json"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    run = RunFolder(tmp_path / "run")
    wanted = linear(run_side(tensors, "decoder", config, IDS), tensors, "output_projection")
    same(run.model()(IDS).logits, wanted)


def test_a_file_without_its_config_or_with_more_than_tensors_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(1), "b": 3}, path)

    def said(**more: Any) -> str:
        with pytest.raises(TorchstoneError) as caught:
            import_run(path, tmp_path / "run", **more)
        assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
        return str(caught.value).replace(str(tmp_path), "")

    assert said(config={}) == "/weights.pt: its config names no model_type; say which layout it has"
    assert said(layout="torchscale-decoder") == "/weights.pt: holds 'b', which is no tensor; save the state dict alone"
    torch.save({"a": Path}, path)
    assert said(layout="torchscale-decoder").startswith("/weights.pt: cannot be read as tensors alone (")
    path.unlink()
    assert said(layout="torchscale-decoder") == (
        "/weights.pt: a layout or a config goes with a file of tensors, and this is no file"
    )


# ------------------------------------------------------------------------------------------- BEiT-3: pictures and texts

BEIT3: dict[str, dict[str, Any]] = {
    "released": {},
    "deepnorm": {"deepnorm": True, "subln": False},
    "scaled": {"no_scale_embedding": False},
    "output": {"no_output_layer": False},
}
PIXELS = torch.randn(2, 3, 8, 8, generator=Key(5).generator())
MASKED = torch.tensor([[True, False, False, True], [False, True, False, False]])
TEXT, SHOWN = IDS[:, SPLIT:], VALID[:, SPLIT:]
INPUTS = {
    "pair": VisionLanguage(PIXELS, TEXT),
    "masked and padded": VisionLanguage(PIXELS, TEXT, MASKED, SHOWN),
    "picture": VisionLanguage(PIXELS, masked=MASKED),
    "text": VisionLanguage(ids=TEXT, valid=SHOWN),
}


def beit3_config(case: str) -> dict[str, Any]:
    own = {"img_size": 8, "patch_size": 4, "multiway": True, "no_output_layer": True}
    return {**sizes("encoder"), **own, **BEIT3[case]}


def beit3_names(config: dict[str, Any]) -> Tensors:
    names = Names()
    side_names(names, "encoder", config, "", False)
    t = {f"encoder.{name}": tensor for name, tensor in names.tensors.items() if not name.startswith("embed")}
    shapes = {
        "text_embed.weight": (V, D),
        "vision_embed.proj.weight": (D, 3, 4, 4),
        "vision_embed.proj.bias": (D,),
        "vision_embed.cls_token": (1, 1, D),
        "vision_embed.mask_token": (1, 1, D),
        "encoder.embed_positions.A.weight": (SPLIT + 2, D),
        "encoder.embed_positions.B.weight": (ROWS, D),
    }
    if not config["no_output_layer"]:
        shapes["encoder.output_projection.weight"] = (V, D)
    return t | {name: 0.3 * torch.randn(shape, generator=names.generator) for name, shape in shapes.items()}


def beit3_formula(t: Tensors, config: dict[str, Any], x: VisionLanguage) -> torch.Tensor:
    """Every token by itself, in the order of the class token, patches in reading order, ids."""
    factor = 1.0 if config.get("no_scale_embedding", True) else D**0.5
    found, ways = [], ""
    if x.pixels is not None:
        grid = F.conv2d(x.pixels, t["vision_embed.proj.weight"], t["vision_embed.proj.bias"], stride=4)
        patches = grid.flatten(2).transpose(1, 2)
        if x.masked is not None:
            patches = torch.where(x.masked[..., None], t["vision_embed.mask_token"], patches)
        seen = torch.cat([t["vision_embed.cls_token"].expand(2, 1, D), patches], 1)
        found.append(seen * factor + t["encoder.embed_positions.A.weight"][2:])
        ways += "A"
    if x.ids is not None:
        places = t["encoder.embed_positions.B.weight"][2 : 2 + x.ids.shape[1]]
        found.append(t["text_embed.weight"][x.ids] * factor + places)
        ways += "B"
    stack = {name.removeprefix("encoder."): tensor for name, tensor in t.items() if ".embed_positions" not in name}
    if ways != "AB":  # only one of each pair is met
        parts = {name: name.split(".") for name in stack}
        stack = {".".join(p for p in path if p not in "AB"): stack[n] for n, path in parts.items() if ways in path}
    valid = None if x.valid is None else x.valid
    if valid is not None and x.pixels is not None:
        valid = torch.cat([torch.ones(2, SPLIT, dtype=torch.bool), valid], 1)
    y = run_side(stack, "encoder", config, TEXT, embedded=torch.cat(found, 1), valid=valid)
    return y if config["no_output_layer"] else y @ t["encoder.output_projection.weight"].T


def shown(x: VisionLanguage, hidden: torch.Tensor) -> torch.Tensor:
    """What is no padding."""
    if x.valid is None:
        return hidden
    valid = x.valid if x.pixels is None else torch.cat([torch.ones(2, SPLIT, dtype=torch.bool), x.valid], 1)
    return hidden[valid]


@pytest.mark.parametrize("case", BEIT3)
@pytest.mark.parametrize("what", INPUTS)
@torch.no_grad()
def test_beit3_gives_what_the_formulas_give(case: str, what: str) -> None:
    config, x = beit3_config(case), INPUTS[what]
    t = beit3_names(config)
    ours = from_torchscale("beit3", config, t)
    assert ours.spec.context == SPLIT + ROWS - 2
    found = ours(x).hidden if config["no_output_layer"] else ours(x).logits
    same(shown(x, found), shown(x, beit3_formula(t, config, x)))


@pytest.mark.parametrize("case", BEIT3)
def test_beit3_is_written_again(case: str) -> None:
    layout, config = find_layout("torchscale-beit3"), beit3_config(case)
    t = beit3_names(config)
    spec = validate(TransformerSpec, layout.to_spec(config, {name: tuple(x.shape) for name, x in t.items()}))
    written = layout.to_theirs(layout.to_ours(t, spec), spec)
    assert written.keys() == t.keys()
    for name, tensor in t.items():
        wanted = tensor.clone()
        if ".embed_positions" in name:
            wanted[:2] = 0
        torch.testing.assert_close(written[name], wanted, rtol=0, atol=0)
    again = layout.to_config(spec)
    assert validate(TransformerSpec, layout.to_spec(again)) == spec and asked(config).items() <= again.items()


# ------------------------------------------------------------------------------------------------- TorchScale itself


def torchscale() -> Any:
    """The library, or a reason to skip: it needs fairscale and timm, whose old releases it pins."""
    try:
        import torchscale.architecture.config
        import torchscale.architecture.decoder
        import torchscale.architecture.encoder_decoder
        import torchscale.architecture.retnet
        import torchscale.component.embedding
    except ImportError as error:
        pytest.skip(f"torchscale cannot be imported ({error})")
    return torchscale


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """TorchScale's experts want a process group, and count choices by a histogram of whole numbers, which torch has
    for no CPU."""
    histc, file = torch.histc, tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    torch.histc = lambda x, **more: histc(x.float(), **more)  # type: ignore[method-assign]
    yield
    torch.histc = histc  # type: ignore[method-assign]
    torch.distributed.destroy_process_group()


def shaken(module: Any) -> Any:
    generator = Key(1).generator()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn + (1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0))
    return module.eval()


@pytest.mark.parametrize(("side", "case"), [(side, case) for side in STACKS for case in STACKS[side]])
@torch.no_grad()
def test_an_encoder_or_a_decoder_gives_what_torchscale_gives(
    side: Any, case: str, request: pytest.FixtureRequest
) -> None:
    library = torchscale()
    architecture, parts = library.architecture, library.component.embedding
    config = {**sizes(side), **STACKS[side][case]}
    made: Any = {"encoder": architecture.encoder, "decoder": architecture.decoder}[side]
    values = getattr(architecture.config, f"{side.capitalize()}Config")(**asked(config))
    if "moe_freq" in config:
        request.getfixturevalue("one_process")
    values.encoder_embedding_type = "language"  # which its encoder asks for where the matrix is tied
    table = parts.PositionalEmbedding(ROWS, D) if config.get("table") else None
    theirs = shaken(getattr(made, side.capitalize())(values, parts.TextEmbedding(V, D), table))
    ours = from_torchscale(side, asked(config), theirs.state_dict())
    if side == "decoder":  # its experts take rows in turn where ours take columns
        ids = IDS[:1] if "moe_freq" in config else IDS
        same(ours(ids).logits, theirs(ids)[0])
    elif "moe_freq" in config:  # its experts take padding too
        same(ours(IDS).logits, theirs(IDS)["encoder_out"])
    else:
        modality, split = (MODALITY, SPLIT) if config.get("multiway") else (None, None)
        found = ours(Tokens.of(IDS, valid=VALID, modality=modality)).logits
        wanted = theirs(IDS, encoder_padding_mask=~VALID, multiway_split_position=split)["encoder_out"]
        same(found[VALID], wanted[VALID])


@pytest.mark.parametrize("case", BEIT3)
@torch.no_grad()
def test_beit3_gives_what_torchscale_gives(case: str) -> None:
    library, config = torchscale(), beit3_config(case)
    values = library.architecture.config.EncoderConfig(**config, max_source_positions=ROWS)
    theirs = shaken(importlib.import_module("torchscale.model.BEiT3").BEiT3(values))
    ours = from_torchscale("beit3", config, theirs.state_dict())
    for x in INPUTS.values():
        padding = None if x.valid is None else ~x.valid
        wanted = theirs(x.ids, x.pixels, padding, vision_masked_position=x.masked)["encoder_out"]
        found = ours(x).hidden if config["no_output_layer"] else ours(x).logits
        same(shown(x, found), shown(x, wanted))


@pytest.mark.parametrize("case", [{}, {"deepnorm": True}, {"subln": False}, {"table": True}])
@torch.no_grad()
def test_an_encoder_decoder_gives_what_torchscale_gives(case: dict[str, Any]) -> None:
    library = torchscale()
    parts = library.component.embedding
    config = {**sizes("encoder", "decoder"), "share_all_embeddings": True, **case}
    values = library.architecture.config.EncoderDecoderConfig(**asked(config))
    source, target = (parts.PositionalEmbedding(ROWS, D) if config.get("table") else None for _ in range(2))
    theirs = library.architecture.encoder_decoder.EncoderDecoder(
        values, parts.TextEmbedding(V, D), source, None, target
    )
    shaken(theirs)
    ours = from_torchscale("encoder-decoder", asked(config), theirs.state_dict())
    same(ours(IDS, memory=SOURCE).logits, theirs(SOURCE, IDS)[0])


@pytest.mark.parametrize("case", [{}, {"deepnorm": True}, {"subln": False, "decoder_normalize_before": False}])
@torch.no_grad()
def test_a_retnet_gives_what_torchscale_gives(case: dict[str, Any]) -> None:
    library = torchscale()
    config = {**RETNET, **case}
    values = library.architecture.config.RetNetConfig(**config)
    theirs = shaken(library.architecture.retnet.RetNetDecoder(values, library.component.embedding.TextEmbedding(V, D)))
    ours = from_torchscale("retnet", config, theirs.state_dict())
    same(ours(IDS).logits, theirs(IDS)[0])


@pytest.mark.parametrize(("side", "length"), [("decoder", 13), ("decoder", 16), ("encoder", 16)])
@torch.no_grad()
def test_a_longnet_gives_what_torchscale_gives(side: Any, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torchscale()
    longnet = pytest.importorskip("torchscale.model.LongNet", reason="release 0.3.0 of torchscale has no LongNet")
    import torchscale.component.multihead_attention as attention

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What a fused kernel of flash attention gives; there is none for a CPU."""
        scores = torch.einsum("blhd,bshd->bhls", q, k) * q.shape[-1] ** -0.5
        if more[-1]:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
        return torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v), scores.logsumexp(-1)

    monkeypatch.setattr(attention, "flash_attn_func", plain)
    library, name = torchscale(), f"LongNet{side.capitalize()}"
    patterns = {"flash_attention": True, "segment_length": "[4, 8, 16]", "dilated_ratio": "[1, 2, 4]"}
    config = {**sizes(side), **patterns}
    values = getattr(library.architecture.config, f"{side.capitalize()}Config")(**config)
    theirs = shaken(getattr(longnet, name)(values, library.component.embedding.TextEmbedding(V, D)))
    ours = from_torchscale(side, {**config, "architectures": [name]}, theirs.state_dict())
    ids = torch.randint(V, (2, length), generator=Key(5).generator())
    wanted = theirs(ids)
    same(ours(ids).logits, wanted[0] if side == "decoder" else wanted["encoder_out"])
