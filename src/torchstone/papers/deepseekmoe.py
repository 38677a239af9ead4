"""DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models (Dai et al. 2024, arXiv
2401.06066)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from torchstone.interop.presets import preset
from torchstone.model.alone import Alone, alone
from torchstone.model.context import Context
from torchstone.model.feedforward.moe import MoESpec
from torchstone.model.feedforward.router import Router
from torchstone.model.feedforward.router.topk import TopKRouter, TopKSpec
from torchstone.model.measure import measure
from torchstone.model.site import Site
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.ops.experts import experts_reference
from torchstone.papers._claim import Claim, Effect, Measured, Number, Paper, Scale
from torchstone.spec import validate

__all__ = ["PAPER"]

BUILDS = (
    "torchstone.model.feedforward.moe",
    "torchstone.model.feedforward.router",
    "torchstone.model.feedforward.router._scored",
    "torchstone.model.feedforward.router.topk",
    "torchstone.ops.experts.grouped",
    "torchstone.ops.experts.rows",
)

# ---------------------------------------------------------------------------------------------------------- arithmetic


def _on_meta(fields: dict[str, Any]) -> Transformer:
    with torch.device("meta"):
        return validate(TransformerSpec, fields).build()


def _router_weights(model: torch.nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if ".router." in name)


def _trained_on(model: Transformer, tokens: int, routers: bool = True) -> float:
    """Operations of a forward and a backward over `tokens` tokens of which each sees all, in 10^12."""
    weights = measure(model).active_parameters - (0 if routers else _router_weights(model))
    mixing = sum(module.flops(tokens) for module in model.modules() if hasattr(module, "flops"))  # type: ignore[operator]
    return 3 * (2 * weights + mixing) * tokens / 1e12


def _segmented() -> dict[str, float]:
    """A model of 16 experts and 2 active, cut finely, and with shared experts: what differs between them."""
    body = {"width": 128, "depth": 2, "vocabulary": 64, "context": 64, "attention": {"heads": 2}}
    counts = []
    for experts, active, shared, hidden in ((16, 2, 0, 512), (64, 8, 0, 128), (63, 7, 1, 128), (60, 4, 4, 128)):
        ffn = {"kind": "moe", "experts": experts, "active": active, "shared": shared, "hidden": hidden}
        model = _on_meta({**body, "ffn": ffn})
        routers, found = _router_weights(model), measure(model)
        assert routers == 2 * experts * 128
        counts.append((found.parameters - routers, found.active_parameters - routers))
    return {
        "parameters beside routers, most over least of 16, 64, 63 + 1, 60 + 4 experts": max(a for a, _ in counts)
        / min(a for a, _ in counts),
        "those that a token meets, most over least": max(b for _, b in counts) / min(b for _, b in counts),
    }


def _sizes(scale: Scale, first: int) -> Measured:
    numbers = {
        "ways to take 2 of 16 experts": float(math.comb(16, 2)),
        "ways to take 8 of 64 experts": float(math.comb(64, 8)),
        **_segmented(),
    }
    for name in ("16b", "145b"):
        counts = measure(_on_meta(preset(f"deepseekmoe-{name}").dump()))
        numbers[f"{name}: parameters, 10^9"] = counts.parameters / 1e9
        numbers[f"{name}: parameters that a token meets, 10^9"] = counts.active_with_embedding / 1e9
    small = _on_meta({**preset("deepseekmoe-2b").dump(), "vocabulary": 8})
    experts = sum(p.numel() for name, p in small.named_parameters() if ".ffn." in name and ".router." not in name)
    counts = measure(small)
    numbers["2b: parameters of experts, 10^9"] = experts / 1e9
    numbers["2b: those that a token meets, 10^9"] = (experts - (counts.parameters - counts.active_with_embedding)) / 1e9
    moe = preset("deepseekmoe-16b").dump()
    attention = [p.numel() for name, p in _on_meta(moe).named_parameters() if ".attention." in name]
    numbers["16b: parameters of attention, 10^9"] = sum(attention) / 1e9
    # the paper's table takes a feed-forward of 8/3 of the width for whole, and no operations of routers
    whole = 8 * 2048 / 3
    ruled = {
        **moe,
        "ffn": {**moe["ffn"], "hidden": round(whole / 4)},
        "layers": [{"at": [0], "ffn": {"kind": "swiglu", "hidden": round(2 * whole)}}],
    }
    dense = preset("deepseek-llm-7b").dump()
    dense["ffn"] = {**dense["ffn"], "hidden": round(8 * 4096 / 3)}
    flops = {
        "16b, experts of 2/3 of the width": _trained_on(_on_meta(ruled), 4096, routers=False),
        "16b, as released": _trained_on(_on_meta(moe), 4096),
        "7b, dense": _trained_on(_on_meta(dense), 4096),
    }
    numbers |= {f"10^12 operations of 4,096 tokens, {name}": value for name, value in flops.items()}
    numbers["16b as released over 7b"] = flops["16b, as released"] / flops["7b, dense"]
    return Measured(numbers)


_sizes.builds = (*BUILDS, "torchstone.model.measure")  # type: ignore[attr-defined]


def _rounds_to(name: str, value: float, digits: int) -> Number:
    return Number(name, low=value - 0.5 * 10**-digits, high=value + 0.5 * 10**-digits)


SIZES = Claim(
    id="sizes",
    kind="arithmetic",
    text="Cutting experts into four, and taking some of them always, changes neither the parameters nor those that a "
    "token meets, but for the router, and leaves 4.4 thousand million choices for 120. The models have the published "
    "parameters, and 16B the published operations if experts are two thirds of the width wide; as released they are "
    "1,408 wide, which is 2 % more.",
    figure="120 and 4,426,165,368; 1.89B and 0.24B of experts; 16.4B, 2.8B active, 0.5B of attention; 144.6B, 22.2B "
    "active; 74.4 and 183.5 TFLOPs per 4k tokens, 40.5 %",
    gates=(
        Number("ways to take 2 of 16 experts", low=120, high=120),
        Number("ways to take 8 of 64 experts", low=4_426_165_368, high=4_426_165_368),
        Number("parameters beside routers, most over least of 16, 64, 63 + 1, 60 + 4 experts", low=1, high=1),
        Number("those that a token meets, most over least", low=1, high=1),
        _rounds_to("2b: parameters of experts, 10^9", 1.89, 2),
        _rounds_to("2b: those that a token meets, 10^9", 0.24, 2),
        _rounds_to("16b: parameters, 10^9", 16.4, 1),
        _rounds_to("16b: parameters that a token meets, 10^9", 2.8, 1),
        _rounds_to("16b: parameters of attention, 10^9", 0.5, 1),
        _rounds_to("145b: parameters, 10^9", 144.6, 1),
        _rounds_to("145b: parameters that a token meets, 10^9", 22.2, 1),
        _rounds_to("10^12 operations of 4,096 tokens, 16b, experts of 2/3 of the width", 74.4, 1),
        _rounds_to("10^12 operations of 4,096 tokens, 7b, dense", 183.5, 1),
        Number("16b as released over 7b", low=0.405, high=0.415),
    ),
    run=_sizes,
)


# ------------------------------------------------------------------------------------------------------------ identity


_D, _H = 16, 24


def _layer(seed: int, **fields: Any) -> Any:
    """A layer of experts in float64 whose weights make choices and gates uneven."""
    part: Any = alone(validate(MoESpec, {"hidden": _H, **fields}), _D, seed=seed).double().part
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).double())
    return part


def _x(seed: int, tokens: int = 40) -> torch.Tensor:
    return torch.randn(2, tokens, _D, generator=torch.Generator().manual_seed(seed)).double()


def _swiglu(up: torch.Tensor, down: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gate, value = (x @ up.T).chunk(2, -1)
    return (F.silu(gate) * value) @ down.T


def _looped(part: Any, x_BTD: torch.Tensor) -> torch.Tensor:
    """Equations 9 to 11, a loop over experts."""
    x_ND = x_BTD.flatten(0, 1)
    s_NE = (x_ND @ part.router.weight.T).softmax(-1)
    gates_NK, experts_NK = s_NE.topk(part.spec.active, -1)
    E = part.spec.experts
    matrices = zip(part.up.weight.chunk(E), part.down.weight.chunk(E), strict=True)
    networks = [lambda x, up=up, down=down: _swiglu(up, down, x) for up, down in matrices]
    y_ND = experts_reference(x_ND, experts_NK, gates_NK, networks)  # type: ignore[arg-type]
    if part.shared is not None:
        y_ND = y_ND + _swiglu(part.shared.up.weight, part.shared.down.weight, x_ND)
    return y_ND.view_as(x_BTD)


def _against_loop(seed: int, **fields: Any) -> tuple[float, float, int]:
    """Largest differences of outputs and of gradients, and experts without a token."""
    part, x = _layer(seed, **fields), _x(seed, 12)
    counts_E = part.router(x, Context.alone(x)).counts.sum(0)
    results = []
    for forward in (lambda x: part(x)[0], lambda x: _looped(part, x)):
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        grads = torch.autograd.grad(y.square().sum(), [leaf, *part.parameters()])
        results.append((y.detach(), grads))
    (y, grads), (wanted, theirs) = results
    size = max(float(g.abs().max()) for g in theirs)
    worst = max(float((a - b).abs().max()) for a, b in zip(grads, theirs, strict=True))
    return float((y - wanted).abs().max() / wanted.abs().max()), worst / size, int((counts_E == 0).sum())


def _sliced(seed: int) -> float:
    """A gated network of 24 hidden units, and 4 experts of 6 of them each, all active with gates of 1."""
    part, x = _layer(seed, experts=4, active=4, hidden=_H // 4, router={"scale": 4.0}), _x(seed)
    with torch.no_grad():
        part.router.weight.zero_()  # even scores of 1/4, which the scale makes 1
        gates_and_values = part.up.weight.unflatten(0, (4, 2, -1))
        up, down = gates_and_values.transpose(0, 1).flatten(0, 2), torch.cat(part.down.weight.chunk(4), 1)
        return float((part(x)[0] - _swiglu(up, down, x)).abs().max())


def _balance(seed: int) -> dict[str, float]:
    """What the balance losses are, where that is known beforehand."""
    router = {"balance": 1.0, "group_balance": 1.0, "groups": 1}
    part, x = _layer(seed, experts=8, active=2, router=router), _x(seed)
    x = x.requires_grad_()
    tokens = x.shape[0] * x.shape[1]
    routing = part.router(x, Context.alone(x))
    f_E = 8 / (2 * tokens) * routing.counts.sum(0)
    (to_router,) = torch.autograd.grad(routing.losses["balance_loss"], part.router.weight)
    with torch.no_grad():
        part.router.weight.zero_()
        even = part.router(x, Context.alone(x)).losses
    return {
        "sum of f_i over the number of experts": float(f_E.sum()) / 8,
        "expert loss over its weight, even scores": float(even["balance_loss"]) / tokens,
        "device loss over its weight, one device": float(routing.losses["group_balance_loss"].detach()) / tokens,
        "expert loss: largest gradient of the router": float(to_router.abs().max()),
        "f_i that have a gradient": float(f_E.requires_grad),
    }


def _unchosen(seed: int) -> float:
    """Largest gradient that an output gives the affinity of an expert that was not chosen."""
    part, x = _layer(seed, experts=8, active=2), _x(seed, 1)[:1]
    scores_BTE = part.router.score(x, Context.alone(x)).detach().requires_grad_()
    part.router.score = lambda x, ctx: scores_BTE
    y, _ = part(x)
    (grad_BTE,) = torch.autograd.grad(y.square().sum(), scores_BTE)
    chosen = scores_BTE.topk(2, -1).indices
    return float(grad_BTE.scatter(-1, chosen, 0.0).abs().max())


def _identities(scale: Scale, first: int) -> Measured:
    seeds = range(first, first + (1 if scale == "quick" else 5))
    outputs = gradients = sliced = unchosen = reordered = 0.0
    empty = 0
    found: dict[str, list[float]] = {}
    for seed in seeds:
        for fields in (
            {"experts": 4, "active": 2},  # no segmentation, none shared
            {"experts": 16, "active": 7, "shared": 1, "hidden": 6},
            {"experts": 32, "active": 1, "shared": 2, "hidden": 4},
        ):
            y, g, idle = _against_loop(seed, **fields)
            outputs, gradients, empty = max(outputs, y), max(gradients, g), max(empty, idle)
        part, x = _layer(seed, experts=15, active=7, shared=1, hidden=6), _x(seed)
        order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed))
        reordered = max(reordered, float((part(x[:, order])[0] - part(x)[0][:, order]).detach().abs().max()))
        sliced, unchosen = max(sliced, _sliced(seed)), max(unchosen, _unchosen(seed))
        for name, value in _balance(seed).items():
            found.setdefault(name, []).append(value)
    spread = {f"{name}, least": min(values) for name, values in found.items()}
    spread |= {f"{name}, most": max(values) for name, values in found.items()}
    return Measured(
        {
            "layer - loop over experts: largest difference, of its size": outputs,
            "the same of gradients": gradients,
            "experts without a token among them": empty,
            "4 slices with gates of 1 - the network that was cut": sliced,
            "tokens in another order: largest difference": reordered,
            "largest gradient of an affinity that was not chosen": unchosen,
            **spread,
        }
    )


_identities.builds = BUILDS  # type: ignore[attr-defined]


def _always(name: str, value: float) -> tuple[Number, Number]:
    return Number(f"{name}, least", low=value - 1e-10), Number(f"{name}, most", high=value + 1e-10)


IDENTITIES = Claim(
    id="segmentation",
    kind="identity",
    text="The layer is equations 9 to 11, forwards and backwards, with shared experts or without, also where experts "
    "have no token; a network cut into slices that all count 1 is the network; scores that were not chosen have no "
    "gradient from the output. The balance losses are their weights at even scores, whatever is chosen, and on one "
    "device; f_i adds up to the number of experts and is a constant.",
    figure="equations 9 to 17",
    gates=(
        Number("layer - loop over experts: largest difference, of its size", high=1e-12),
        Number("the same of gradients", high=1e-12),
        Number("experts without a token among them", low=1),
        Number("4 slices with gates of 1 - the network that was cut", high=1e-12),
        Number("tokens in another order: largest difference", high=1e-12),
        Number("largest gradient of an affinity that was not chosen", high=0),
        *_always("sum of f_i over the number of experts", 1.0),
        *_always("expert loss over its weight, even scores", 1.0),
        *_always("device loss over its weight, one device", 1.0),
        Number("expert loss: largest gradient of the router, least", low=1e-6),
        *_always("f_i that have a gradient", 0.0),
    ),
    run=_identities,
)


# ------------------------------------------------------------------------------------------------------ planted skills


class DetachedSpec(TopKSpec):
    """Gates that pass no gradient, so that the balance loss alone teaches the router: for the claim's sabotage arm."""

    kind: ClassVar[str] = "topk_detached"
    offered: ClassVar[bool] = False

    def build(self, site: Site, experts: int, active: int) -> Router:
        return _Detached(self, site, experts, active)


class _Detached(TopKRouter):
    def gate(self, scores_BTE: torch.Tensor, experts_BTK: torch.Tensor) -> torch.Tensor:
        return super().gate(scores_BTE.detach(), experts_BTK)


@dataclass(frozen=True)
class Skills:
    """A regression whose targets are sums of what all inputs need and of four of sixteen things that some need.

    x = [z ; sum of the keys of 4 of 16 skills], y = common(z) + sum of skill_i(z) over these four; `common` is a
    network of one layer of 64 hidden units, a skill one of 16, all drawn once by `seed`.
    """

    seed: int
    width: int = 64
    skills: int = 16
    chosen: int = 4

    def batches(self, rows: int, draw: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Endless pairs of x and y, each (rows, width)."""
        weights, rows_of = torch.Generator().manual_seed(self.seed), torch.Generator().manual_seed(draw)
        half = self.width // 2

        def matrix(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=weights) / shape[-2] ** 0.5

        keys_SC = torch.randn(self.skills, half, generator=weights) / self.chosen**0.5
        common = matrix(half, 64), matrix(64, self.width)
        up_SCF, down_SFD = matrix(self.skills, half, 16), matrix(self.skills, 16, self.width)
        while True:
            z_BC = torch.randn(rows, half, generator=rows_of)
            picked = torch.rand(rows, self.skills, generator=rows_of).topk(self.chosen, -1).indices
            has_BS = torch.zeros(rows, self.skills).scatter(1, picked, 1.0)
            hidden_BSF = torch.einsum("bc,scf->bsf", z_BC, up_SCF).relu() * has_BS[..., None]
            y_BD = (z_BC @ common[0]).relu() @ common[1] + torch.einsum("bsf,sfd->bd", hidden_BSF, down_SFD)
            yield torch.cat([z_BC, has_BS @ keys_SC], 1), y_BD


# experts, active, shared, hidden units of one: all but the last have the same parameters and operations but for routers
_ARMS = {
    "gshard": (8, 2, 0, 64),
    "with a shared expert": (7, 1, 1, 64),
    "fine-grained": (32, 8, 0, 16),
    "deepseekmoe": (31, 7, 1, 16),
    "detached": (31, 7, 1, 16),
    "gshard 1.5 times as wide": (8, 2, 0, 96),
}
_RATES = (5e-3, 1e-2, 2e-2, 4e-2)
_TUNING_SEED = 500_000
_SHIFT = 100_000


def _arm(name: str, seed: int) -> Alone:
    experts, active, shared, hidden = _ARMS[name]
    router = {"kind": "topk_detached" if name == "detached" else "topk", "balance": 1e-3}
    fields = {"experts": experts, "active": active, "shared": shared, "hidden": hidden, "router": router}
    return alone(validate(MoESpec, {**fields, "gated": False, "activation": "relu"}), Skills(0).width, seed=seed)


def _trained(name: str, seed: int, rate: float, steps: int) -> float:
    """ln of the share of the targets' variance that is left after training."""
    layer, task = _arm(name, seed), Skills(seed)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=rate, weight_decay=0.0)
    for step, (x_BD, y_BD) in zip(range(steps), task.batches(256, seed + 1), strict=False):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 50) * (1 - step / steps)
        loss = F.mse_loss(layer(x_BD[None])[0], y_BD)
        loss = loss + sum(total / count for key, (total, count) in layer.aux.items() if key.endswith("_loss"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    layer.eval()
    with torch.no_grad():
        x_BD, y_BD = next(task.batches(8192, seed + 2))
        return math.log(float(F.mse_loss(layer(x_BD[None])[0], y_BD) / y_BD.var(0).mean()))


def _planted(scale: Scale, first: int) -> Measured:
    torch.set_num_threads(1)
    steps, seeds, control_seeds = (150, 2, 1) if scale == "quick" else (1500, 5, 3)
    values: dict[str, dict[int, float]] = {}
    numbers: dict[str, float] = {}
    for name in _ARMS:
        rate = 1e-2
        if scale != "quick":
            rate = min(_RATES, key=lambda rate: _trained(name, _TUNING_SEED, rate, steps))
        numbers[f"{name}: learning rate"] = rate
        for seed in range(first, first + (control_seeds if name == "detached" else seeds)):
            values.setdefault(name, {})[seed] = _trained(name, seed, rate, steps)
        if name == "gshard":
            values["gshard again"] = {
                seed: _trained(name, seed, rate, steps)
                for seed in range(first + _SHIFT, first + _SHIFT + control_seeds)
            }
    return Measured(numbers, values)


_planted.builds = BUILDS  # type: ignore[attr-defined]

_CONTROLS: dict[str, Any] = {"null": "gshard again", "sabotage": "detached"}

PLANTED = Claim(
    id="planted-skills",
    kind="behaviour",
    text="Where targets are sums of what all inputs need and of four of sixteen skills, 31 small experts of which 7 "
    "are taken, with one shared, leave at least a tenth less error than 8 large ones of which 2 are taken, of the same "
    "parameters and operations; cutting alone and sharing alone help too; and they leave at most a tenth more than "
    "large ones one and a half times as wide. Each at the best of four learning rates; errors as natural logarithms of "
    "a share of the variance.",
    figure="Pile loss 1.808 for DeepSeekMoE, 1.867 for GShard of the same size, 1.808 for GShard 1.5 times as large; "
    "both changes help on their own",
    gates=(
        # a tenth of the error: the smallest difference that a layout of experts is worth
        Effect("a tenth better than large experts", "deepseekmoe", "gshard", margin=0.1, **_CONTROLS),
        Effect("cutting alone helps", "fine-grained", "gshard", margin=0.0, **_CONTROLS),
        Effect("sharing alone helps", "with a shared expert", "gshard", margin=0.0, **_CONTROLS),
        Effect(
            "not a tenth worse than wider experts",
            "deepseekmoe",
            "gshard 1.5 times as wide",
            margin=-0.1,
            sabotage="detached",
        ),
    ),
    run=_planted,
)

PAPER = Paper(
    slug="deepseekmoe",
    title="DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models",
    authors="Damai Dai, Chengqi Deng, Chenggang Zhao, R.X. Xu, Huazuo Gao, Deli Chen, Jiashi Li, Wangding Zeng, "
    "Xingkai Yu, Y. Wu, Zhenda Xie, Y.K. Li, Panpan Huang, Fuli Luo, Chong Ruan, Zhifang Sui, Wenfeng Liang",
    year=2024,
    link="https://arxiv.org/abs/2401.06066",
    topics=("mixture of experts", "feed-forward", "efficiency"),
    parts=("ffn.moe", "router.topk"),
    summary="Experts cut into many small ones, of which a token takes more, and some that every token takes: more "
    "combinations for the same parameters and operations.",
    claims=(SIZES, IDENTITIES, PLANTED),
)
