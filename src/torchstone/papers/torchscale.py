"""TorchScale: Transformers at Scale (Ma et al. 2022, arXiv 2211.13184)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from torchstone.errors import TorchstoneError
from torchstone.interop.layout import find_layout
from torchstone.interop.torchscale import from_torchscale
from torchstone.model.residual.deepnorm import constants
from torchstone.model.residual.subln import gain
from torchstone.papers._claim import Arms, Claim, Effect, Measured, Number, Paper, Scale, Setting

__all__ = ["PAPER"]

# ------------------------------------------------------------------------------------------------------- its weights

_D, _H, _F, _V, _L, _T = 32, 4, 48, 61, 3, 12
_CONFIG = {
    **{"vocab_size": _V, "decoder_embed_dim": _D, "decoder_attention_heads": _H, "decoder_ffn_embed_dim": _F},
    **{"decoder_layers": _L},
}


def _checkpoint(seed: int) -> dict[str, torch.Tensor]:
    """A state dict of TorchScale's `Decoder` as its options come, Sub-LN on and no positions."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (_V, _D), "output_projection": (_V, _D), "layer_norm": (_D,)}
    for i in range(_L):
        shapes |= {f"layers.{i}.self_attn.{part}_proj": (_D, _D) for part in ("q", "k", "v", "out")}
        shapes |= {f"layers.{i}.ffn.fc1": (_F, _D), f"layers.{i}.ffn.fc2": (_D, _F)}
        shapes |= {f"layers.{i}.{norm}": (_D,) for norm in ("self_attn_layer_norm", "final_layer_norm")}
        shapes |= {f"layers.{i}.self_attn.inner_attn_ln": (_D,), f"layers.{i}.ffn.ffn_layernorm": (_F,)}
    found = {}
    for name, shape in shapes.items():
        found[f"{name}.weight"] = 0.3 * torch.randn(shape, generator=generator) + (len(shape) == 1)
        if name.startswith("layer"):
            found[f"{name}.bias"] = 0.3 * torch.randn(shape[0], generator=generator)
    return found


def _decoder(t: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Its logits, from the equations."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, t[f"{name}.weight"], t.get(f"{name}.bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"])

    x, ahead = t["embed_tokens.weight"][ids], torch.ones(_T, _T, dtype=torch.bool).triu(1)
    for i in range(_L):
        at = f"layers.{i}"
        h = norm(x, f"{at}.self_attn_layer_norm")
        q, k, v = (linear(h, f"{at}.self_attn.{part}_proj").unflatten(-1, (_H, -1)).transpose(1, 2) for part in "qkv")
        scores = (q @ k.transpose(-1, -2) * (_D // _H) ** -0.5).masked_fill(ahead, float("-inf"))
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        x = x + linear(norm(y, f"{at}.self_attn.inner_attn_ln"), f"{at}.self_attn.out_proj")
        h = F.gelu(linear(norm(x, f"{at}.final_layer_norm"), f"{at}.ffn.fc1"))
        x = x + linear(norm(h, f"{at}.ffn.ffn_layernorm"), f"{at}.ffn.fc2")
    return linear(norm(x, "layer_norm"), "output_projection")


def _weights(scale: Scale, first: int) -> Measured:
    tensors = _checkpoint(first)
    ids = torch.randint(_V, (2, _T), generator=torch.Generator().manual_seed(first))
    with torch.no_grad():
        wanted = _decoder(tensors, ids)
        model = from_torchscale("decoder", _CONFIG, tensors)
        numbers = {"difference of logits, of the largest": _apart(model(ids).logits, wanted)}
        swapped = dict(tensors)
        for end in ("weight", "bias"):
            swapped |= {f"layers.1.self_attn.k_proj.{end}": tensors[f"layers.1.self_attn.q_proj.{end}"]}
        other = from_torchscale("decoder", _CONFIG, swapped)
        numbers["the same with one matrix for another"] = _apart(other(ids).logits, wanted)
    back = find_layout("torchscale-decoder").to_theirs(model.state_dict(), model.spec)
    numbers["tensors that differ once written again"] = float(
        sum(name not in back or not torch.equal(back[name], tensor) for name, tensor in tensors.items())
        + len(back.keys() - tensors.keys())
    )
    alphas, gammas = [], []
    for layers in (1, 6, 100):
        N = M = layers
        alphas += [constants((0, M), "decoder")[0] / (2 * M) ** 0.25, constants((N, 0), "encoder")[0] / (2 * N) ** 0.25]
        alphas += [constants((N, M), "encoder")[0] / (0.81 * (N**4 * M) ** 0.0625)]
        alphas += [constants((N, M), "decoder")[0] / (3 * M) ** 0.25]
        gammas += [gain((0, M), "decoder") ** 2 / torch.tensor(2.0 * M, dtype=torch.float64).log().item()]
        gammas += [gain((N, M), "decoder") ** 2 / torch.tensor(3.0 * M, dtype=torch.float64).log().item()]
    numbers["weights of skips, over TorchScale's: largest deviation"] = max(abs(a - 1) for a in alphas)
    numbers["first values under Sub-LN, over TorchScale's: largest deviation"] = max(abs(g - 1) for g in gammas)
    wrong = ({"deepnorm": True, "subln": True}, {"decoder_layer": 3}, {"multiway": True}, {"activation_fn": "tanh"})
    numbers["configs refused, of 4 that have no meaning or no place"] = float(sum(_refused(each) for each in wrong))
    return Measured(numbers)


def _apart(a: torch.Tensor | None, b: torch.Tensor) -> float:
    assert a is not None
    return float((a - b).abs().max() / b.abs().max())


def _refused(change: dict[str, Any]) -> bool:
    try:
        find_layout("torchscale-decoder").to_spec({**_CONFIG, **change})
    except TorchstoneError:
        return True
    return False


_weights.builds = (  # type: ignore[attr-defined]
    "torchstone.interop.layouts._torchscale",
    "torchstone.interop.layouts.torchscale_decoder",
    "torchstone.model.residual.subln",
    "torchstone.model.residual.deepnorm",
    "torchstone.model.attention.softmax",
    "torchstone.model.feedforward.mlp",
)

WEIGHTS = Claim(
    id="weights-load",
    kind="identity",
    text="A checkpoint of TorchScale's decoder gives the logits here that its equations give, and is the same once "
    "written again; weights of skips and first values have its tables; what has no meaning or no place is refused.",
    figure="TorchScale's code: alpha (2L)^(1/4), 0.81 (N^4 M)^(1/16), (3M)^(1/4); gamma sqrt(ln 2L), sqrt(ln 3M)",
    gates=(
        Number("difference of logits, of the largest", high=1e-5),
        Number("the same with one matrix for another", low=1e-2),
        Number("tensors that differ once written again", high=0),
        Number("weights of skips, over TorchScale's: largest deviation", high=1e-12),
        Number("first values under Sub-LN, over TorchScale's: largest deviation", high=1e-12),
        Number("configs refused, of 4 that have no meaning or no place", low=4, high=4),
    ),
    run=_weights,
)

# ------------------------------------------------------------------------------------------------ six layers, a hundred

_STEPS, _WIDTH = 100, 32
_XAVIER = _WIDTH**-0.5  # deviation that Xavier gives a square matrix


def _arm(residual: str, depth: int, **fields: Any) -> dict[str, Any]:
    return {"model": {"depth": depth, "residual": {"kind": residual, "std": _XAVIER, **fields}}}


DEPTH = Claim(
    id="six-layers-and-a-hundred",
    kind="behaviour",
    text="After 100 steps at one learning rate for all, decoders of 100 layers with Sub-LN or DeepNorm have a loss at "
    "most 0.05 nats a byte above that of 6 layers, and with DeepNorm at least 0.15 below that of 100 as Post-LN.",
    figure="the deeper, the better, and stable, where the baseline diverges; one learning rate for all depths",
    gates=(
        Effect("Sub-LN: 100 layers as good as 6", "subln_100", "subln_6", margin=-0.05, sabotage="bare_100"),
        Effect("DeepNorm: 100 layers as good as 6", "deepnorm_100", "deepnorm_6", margin=-0.05, sabotage="no_beta_100"),
        Effect(
            "DeepNorm trains where Post-LN does not",
            "deepnorm_100",
            "post_100",
            margin=0.15,
            null="post_again",
            sabotage="no_beta_100",
        ),
    ),
    arms=Arms(
        recipe={
            "model": {
                "width": _WIDTH,
                "depth": 100,
                "attention": {"kind": "softmax", "heads": 2},
                "position": "learned",
                "ffn": {"kind": "mlp", "hidden": 2 * _WIDTH},
                "norm": "layernorm",
                "residual": {"kind": "subln", "std": _XAVIER},
                "head": {"kind": "lm", "tied": False},
            },
            "data": {"corpus": "packages", "tokenizer": "bytes", "block": 32},
            "optimizer": {"kind": "adamw", "lr": 1e-3, "betas": [0.9, 0.98], "weight_decay": 0.0},
            "schedule": {"kind": "constant", "warmup": 20},
            "trainer": {
                "steps": _STEPS,
                "batch": 8,
                "clip": None,
                "threads": 1,
                "precision": "fp32",
                "compile": "off",
                "save_every": _STEPS,
            },
            "evaluate": {"every": _STEPS, "blocks": 64, "test_blocks": 256},
        },
        patches={
            "subln_100": _arm("subln", 100),
            "subln_6": _arm("subln", 6),
            "deepnorm_100": _arm("deepnorm", 100),
            "deepnorm_6": _arm("deepnorm", 6),
            "post_100": _arm("post", 100),
            "post_again": _arm("post", 100),
            "bare_100": _arm("subln_bare", 100),
            "no_beta_100": _arm("deepnorm", 100, beta=1.0),
            # TorchScale's decoder with deepnorm alone is no arm: at 100 layers its first values overflow float32
        },
        settings={
            "quick": Setting(seeds=1, control_seeds=1, patch={"trainer": {"steps": 10}}),
            "evidence": Setting(seeds=5, control_seeds=3),
            "gpu": Setting(
                seeds=5,
                control_seeds=3,
                patch={
                    "model": {"width": 256, "attention": {"heads": 4}, "ffn": {"hidden": 1024}},
                    "data": {"block": 256},
                    "optimizer": {"lr": 5e-4},
                    "schedule": {"warmup": 400},
                    "trainer": {"steps": 5000, "precision": "bf16", "compile": "auto", "recompute": True},
                },
            ),
        },
        metric="test_loss",
        shifted=("post_again",),
        imports=("torchstone.papers.magneto",),
    ),
)

PAPER = Paper(
    slug="torchscale",
    title="TorchScale: Transformers at Scale",
    authors="Shuming Ma, Hongyu Wang, Shaohan Huang, Wenhui Wang, Zewen Chi, Li Dong, Alon Benhaim, Barun Patra, "
    "Vishrav Chaudhary, Xia Song, Furu Wei",
    year=2022,
    link="https://arxiv.org/abs/2211.13184",
    topics=("library", "depth", "mixture of experts", "checkpoints"),
    parts=("residual.weighted", "ffn.gshard"),
    summary="A library whose switches are DeepNorm, Sub-LN, xPos, retention, dilated attention and experts. Its "
    "checkpoints load here; what a switch does there is a part here.",
    claims=(WEIGHTS, DEPTH),
)
