"""X-MoE: On the Representation Collapse of Sparse Mixture of Experts (Chi et al. 2022, arXiv 2204.09179)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from torchstone.evaluate.routing import expert_choices, representation_collapse, routing_fluctuation
from torchstone.keys import Key
from torchstone.model.context import Context
from torchstone.model.feedforward.router import Router
from torchstone.model.feedforward.router.cosine import CosineRouter, CosineSpec
from torchstone.model.site import Site, initialise
from torchstone.model.transformer import TransformerSpec
from torchstone.papers._claim import Claim, Effect, Measured, Number, Paper, Scale, one_thread
from torchstone.recipe import load_recipe
from torchstone.spec import resolve, validate
from torchstone.train.engine import Trainer
from torchstone.train.training import make_trainer

__all__ = ["PAPER"]

BUILDS = (
    "torchstone.model.feedforward.router.cosine",
    "torchstone.model.feedforward.router.topk",
    "torchstone.model.feedforward.router._scored",
    "torchstone.model.feedforward.router",
)

# ---------------------------------------------------------------------------------------------------------- arithmetic


def _router(kind: str, width: int, experts: int, active: int, seed: int = 0, **fields: Any) -> Any:
    """A router of random weights in float64."""
    spec: Any = validate(resolve("router", kind), fields)
    module = initialise(spec.build(Site(width=width), experts, active), seed).double()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            drawn = torch.randn(parameter.shape, generator=Key(seed).fold("x-moe", number).generator())
            parameter.add_(0.4 * drawn.double())
    return module


def _sizes(scale: Scale, first: int) -> Measured:
    return Measured(
        {
            f"parameters of a router {name} for 32 experts at width 768": sum(p.numel() for p in router.parameters())
            for name, router in (("by cosine", _router("cosine", 768, 32, 1)), ("by dot", _router("topk", 768, 32, 1)))
        }
    )


_sizes.builds = BUILDS  # type: ignore[attr-defined]

SIZES = Claim(
    id="router-parameters",
    kind="arithmetic",
    text="With half as many dimensions as experts, a router by cosine has d_e (d + N) + 1 parameters, about half of "
    "the d N of a router by dot product.",
    figure="arithmetic of the paper's model: d = 768, N = 32, d_e = 16",
    gates=(
        Number("parameters of a router by cosine for 32 experts at width 768", low=12_801, high=12_801),
        Number("parameters of a router by dot for 32 experts at width 768", low=24_576, high=24_576),
    ),
    run=_sizes,
)

# ------------------------------------------------------------------------------------------------------------ identity


_D, _N, _C = 24, 12, 4


def _x(seed: int, rows: int = 40) -> torch.Tensor:
    return torch.randn(1, rows, _D, generator=Key(seed).fold("x").generator()).double()


def _identity_of_collapse(seed: int) -> float:
    """h' = h + S_k F_k(h): dL/dh less J^T g + sum over j of S_k (delta_kj - S_j) <F_k(h), g> e_j, largest difference of
    its size (section 2.2)."""
    router, h = _router("topk", _D, _N, 1, seed), _x(seed, 1)[0, 0].requires_grad_()
    W, g = _x(seed + 1, _D)[0], _x(seed + 2, 1)[0, 0]
    routing = router(h[None, None], Context.alone(h[None, None]))
    k, e = int(routing.experts), router.weight.detach()
    (found,) = torch.autograd.grad((h + routing.gates.squeeze() * torch.tanh(W @ h)) @ g, h)
    with torch.no_grad():
        S, f = (e @ h).softmax(-1), torch.tanh(W @ h)
        J = torch.eye(_D).double() + S[k] * (1 - f**2)[:, None] * W
        wanted = J.T @ g + ((F.one_hot(torch.tensor(k), _N) - S) * S[k] * (f @ g)) @ e
    return float((found - wanted).abs().max() / wanted.abs().max())


def _rank(router: Any, seed: int) -> int:
    """Of the gradients of 40 tokens that come through the gates."""
    x = _x(seed).requires_grad_()
    gates = router(x, Context.alone(x)).gates
    (grad,) = torch.autograd.grad((gates * _x(seed + 3)[..., : gates.shape[-1]]).sum(), x)
    return int(torch.linalg.matrix_rank(grad[0]))


def _of_cosine(seed: int) -> dict[str, float]:
    router, x = _router("cosine", _D, _N, 2, seed, dim=_C, balance=1.0), _x(seed).requires_grad_()
    ctx = Context.alone(x)
    score = router.score(x, ctx)
    along = 0.0
    for e in range(_N):
        to_x, to_e = torch.autograd.grad(score[..., e].sum(), (x, router.weight), retain_graph=True)
        along = max(
            along, float((to_x * x.detach()).sum(-1).abs().max()), abs(float(to_e[e] @ router.weight[e].detach()))
        )
    loss = router(x, ctx).losses["balance_loss"]
    to_tau = torch.autograd.grad(loss, router.log_temperature, allow_unused=True, retain_graph=True)[0]
    found = {
        "largest cosine": float(score.detach().abs().max()),
        "gradient along the token or the expert": along,
        "rank of the gradients of 40 tokens, by cosine in 4 dimensions": float(_rank(router, seed)),
        "gradient of the balance loss on the temperature": 0.0 if to_tau is None else float(to_tau.abs()),
    }
    normal = _router("cosine", _D, _N, 2, seed, normalise=True)
    sums = normal(x, ctx).gates.sum(-1).detach()
    found["gates of two experts that are normalised: sum less 1"] = float((sums - 1).abs().max())
    with torch.no_grad():
        turn = torch.linalg.qr(_x(seed + 4)[0, :_C, :_C])[0]
        longer = 3.7 * x
        router.weight.mul_(torch.linspace(0.5, 4, _N).double()[:, None])
        router.weight.copy_(router.weight @ turn.T)
        router.down.copy_(turn @ router.down)
        found["change with lengths and a common rotation"] = float((router.score(longer, ctx) - score).abs().max())
        router.weight.copy_(router.weight[:1].expand_as(router.weight))
        even = router(x, ctx).losses["balance_loss"]
        found["balance loss over its weight, even scores"] = float(even) / x.shape[1]
    return found


def _frozen(seed: int) -> float:
    """Share of choices that change in 10 steps of fine-tuning experts alone, weight decay and momentum in the
    optimiser."""
    model = {"width": 32, "depth": 1, "attention": {"heads": 2}, "vocabulary": 64, "context": 32}
    model |= {"ffn": {"kind": "moe", "experts": 8, "active": 1, "hidden": 16, "router": "cosine"}}
    built: Any = initialise(validate(TransformerSpec, model).build(), seed)
    ids = torch.randint(64, (4, 32), generator=Key(seed).generator())
    before = expert_choices(built, ids)
    for name, parameter in built.named_parameters():
        parameter.requires_grad_(".ffn." in name and ".router." not in name)
    trained = [p for p in built.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(built(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    return max(routing_fluctuation(before, expert_choices(built, ids)).values())


def _no_pull(scale: Scale, first: int) -> Measured:
    found: dict[str, list[float]] = {}
    for seed in range(first, first + (2 if scale == "quick" else 10)):
        each = _of_cosine(seed) | {
            "collapse identity: largest difference, of its size": _identity_of_collapse(seed),
            "rank of the gradients of 40 tokens, by dot with 12 experts": float(
                _rank(_router("topk", _D, _N, 1, seed), seed)
            ),
            "choices that change while experts are fine-tuned": _frozen(seed),
        }
        for name, value in each.items():
            found.setdefault(name, []).append(value)
    return Measured({name: max(values) for name, values in found.items()})


_no_pull.builds = (*BUILDS, "torchstone.evaluate.routing")  # type: ignore[attr-defined]

NO_PULL = Claim(
    id="no-pull",
    kind="identity",
    text="By dot product, the gradient of a token has a part in the span of the experts' vectors, as the paper "
    "derives. A cosine changes with neither length nor a common rotation, gives no gradient along token or expert, and "
    "its gradients lie in as few dimensions as its space has; the temperature cannot lower the balance loss. While a "
    "router and what it reads are frozen, no choice changes.",
    figure="dL/dh = J^T g + sum over j of c_j e_j; cosine in d_e dimensions",
    gates=(
        Number("collapse identity: largest difference, of its size", high=1e-12),
        Number("rank of the gradients of 40 tokens, by dot with 12 experts", low=11, high=11),
        Number("rank of the gradients of 40 tokens, by cosine in 4 dimensions", low=4, high=4),
        Number("largest cosine", high=1 + 1e-12),
        Number("change with lengths and a common rotation", high=1e-12),
        Number("gradient along the token or the expert", high=1e-12),
        Number("gradient of the balance loss on the temperature", high=0),
        Number("balance loss over its weight, even scores", low=1 - 1e-12, high=1 + 1e-12),
        Number("gates of two experts that are normalised: sum less 1", high=1e-12),
        Number("choices that change while experts are fine-tuned", high=0),
    ),
    run=_no_pull,
)


# ------------------------------------------------------------------------------------------------------------ training


class SampledSpec(CosineSpec):
    """Experts are drawn by their gates and not the best taken, in evaluation too: a defect for a sabotage arm."""

    kind: ClassVar[str] = "cosine_sampled"
    offered: ClassVar[bool] = False

    def build(self, site: Site, experts: int, active: int) -> Router:
        return _Sampled(self, site, experts, active)


class _Sampled(CosineRouter):
    def select(self, scores_BTE: torch.Tensor, ctx: Context) -> torch.Tensor:
        gumbel_BTE = -torch.empty_like(scores_BTE).exponential_().log()
        return self.best(scores_BTE / self.log_temperature.exp() + gumbel_BTE)


class MultipliedSpec(CosineSpec):
    """Cosines times the temperature instead of over it, so that all gates are nearly alike and the router learns little
    but the balance: a defect for a sabotage arm."""

    kind: ClassVar[str] = "cosine_multiplied"
    offered: ClassVar[bool] = False

    def build(self, site: Site, experts: int, active: int) -> Router:
        return _Multiplied(self, site, experts, active)


class _Multiplied(CosineRouter):
    def gate(self, scores_BTE: torch.Tensor, experts_BTK: torch.Tensor) -> torch.Tensor:
        return (scores_BTE * self.log_temperature.exp()).softmax(-1).gather(-1, experts_BTK)


@dataclass(frozen=True)
class _Size:
    """What a scale spends."""

    steps: int
    every: int
    seeds: int
    control_seeds: int
    grid: tuple[tuple[float, float], ...] = ((4e-3, 0.01),)
    """Learning rates and weights of the balance loss to choose from."""


_GRID = tuple(itertools.product((2e-3, 4e-3, 8e-3), (0.01, 0.1)))
_SIZES = {
    "quick": _Size(steps=60, every=10, seeds=1, control_seeds=1),
    "evidence": _Size(steps=300, every=25, seeds=8, control_seeds=3, grid=_GRID),
}
_ROUTERS = {
    "cosine": "cosine",
    "dot": "topk",
    "sampled": "cosine_sampled",
    "multiplied": "cosine_multiplied",
}
_TUNING_SEED = 500_000
_SHIFT = 100_000


def _recipe(size: _Size, arm: str, seed: int, rate: float, balance: float) -> dict[str, Any]:
    router = {"kind": _ROUTERS[arm], "balance": balance}
    moe = {"kind": "moe", "experts": 16, "active": 1, "hidden": 64, "gated": False, "router": router}
    return {
        "model": {
            "width": 64,
            "depth": 3,
            "attention": {"heads": 4},
            "ffn": {"kind": "mlp", "hidden": 256},
            "layers": [{"at": [1], "ffn": moe}],
        },
        "data": {"corpus": "packages", "tokenizer": "bytes", "block": 64},
        "optimizer": {"kind": "adamw", "lr": rate},
        "schedule": {"kind": "cosine", "warmup": 20},
        "trainer": {**one_thread(size.steps, 16)["trainer"], "seed": seed},
    }


def _looked_at(trainer: Trainer, ids_BT: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
    """The choices of held-out tokens, and ln of the collapse of the vectors that the router reads."""
    model: Any = trainer.model
    seen: list[torch.Tensor] = []
    hook = model.decoder.layers[1].ffn.router.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    chosen = expert_choices(model, ids_BT)
    hook.remove()
    (experts_BTK,) = chosen.values()
    return chosen, math.log(representation_collapse(seen[0].flatten(0, 1), experts_BTK.flatten()))


def _measured(size: _Size, arm: str, seed: int, setting: tuple[float, float], split: str = "test") -> dict[str, float]:
    """Of one training: nats a byte, and over the second half, ln of the mean share of held-out tokens whose expert
    changes from a look to the next, and the mean of ln of the collapse."""
    trainer = make_trainer(load_recipe(_recipe(size, arm, seed, *setting)))[0]
    assert trainer.source.valid is not None
    ids_BT = next(trainer.source.valid.evaluation(32, 32))["ids"]
    looks = []
    for step in range(1, size.steps + 1):
        trainer.train_step()
        if step % size.every == 0 and 2 * step >= size.steps:
            looks.append(_looked_at(trainer, ids_BT))
    changed = [routing_fluctuation(a, b) for (a, _), (b, _) in itertools.pairwise(looks)]
    (shares,) = zip(*(each.values() for each in changed), strict=True)
    return {
        "loss": trainer.measure_split(getattr(trainer.source, split), split, 256)[f"{split}_loss"],
        "fluctuation": math.log(sum(shares) / len(shares)),
        "collapse": sum(collapse for _, collapse in looks) / len(looks),
    }


def _trained(scale: Scale, first: int, sabotage: str) -> Measured:
    """The arms, each at its best of a grid of learning rates and weights of the balance loss; the sabotage arm at that
    of the method."""
    size = _SIZES[scale]
    values: dict[str, dict[int, float]] = {}
    numbers: dict[str, float] = {}
    setting = size.grid[0]
    for arm in ("dot", "cosine", sabotage):
        if len(size.grid) > 1 and arm != sabotage:
            losses = {each: _measured(size, arm, _TUNING_SEED, each, "valid")["loss"] for each in size.grid}
            setting = min(losses, key=losses.__getitem__)
        numbers |= {f"{arm}: learning rate": setting[0], f"{arm}: weight of the balance loss": setting[1]}
        seeds = {arm: range(first, first + (size.control_seeds if arm == sabotage else size.seeds))}
        if arm == "dot":
            seeds["dot again"] = range(first + _SHIFT, first + _SHIFT + size.control_seeds)
        for name, some in seeds.items():
            for seed in some:
                for what, value in _measured(size, arm, seed, setting).items():
                    values.setdefault(f"{name}: {what}", {})[seed] = value
    return Measured(numbers, values)


def _steadier(scale: Scale, first: int) -> Measured:
    return _trained(scale, first, "sampled")


def _apart(scale: Scale, first: int) -> Measured:
    return _trained(scale, first, "multiplied")


for _run in (_steadier, _apart):
    _run.builds = (*BUILDS, "torchstone.model.feedforward.moe", "torchstone.evaluate.routing")  # type: ignore[attr-defined]

STEADIER = Claim(
    id="steadier-routing",
    kind="behaviour",
    text="In a byte model with 16 experts of which one is taken, routing by cosine changes the expert of at least 5 % "
    "fewer held-out tokens between checkpoints 25 steps apart, over the second half of training, than routing by dot "
    "product; each at its best of three learning rates and two weights of the balance loss. In natural logarithms of "
    "the share. Losses are measured beside it and no part of the claim: in a model of this size they hardly depend on "
    "who is routed where, and a router that draws experts by chance has the same.",
    figure="steadier routing within a run and between runs, and better results on seven multilingual benchmarks than a "
    "mixture of experts that routes by dot product",
    gates=(
        Effect(
            "a twentieth fewer changes",
            "cosine: fluctuation",
            "dot: fluctuation",
            margin=-math.log(0.95),  # of the tokens that change, the smallest share that would be noticed
            null="dot again: fluctuation",
            sabotage="sampled: fluctuation",
        ),
    ),
    run=_steadier,
)

APART = Claim(
    id="collapse",
    kind="behaviour",
    text="In such trainings, vectors that the router reads vary more among tokens of one expert, beside how far "
    "apart experts' means lie, if it routes by cosine: Tr(S_W S_B^+) is higher. In natural logarithms, over the second "
    "half of training.",
    figure="representations of tokens are less collapsed than with routing by dot product (figures of the paper)",
    gates=(
        Effect(
            "less collapsed",
            "cosine: collapse",
            "dot: collapse",
            margin=0.0,
            null="dot again: collapse",
            sabotage="multiplied: collapse",
            lower_is_better=False,
        ),
    ),
    run=_apart,
)

PAPER = Paper(
    slug="x-moe",
    title="On the Representation Collapse of Sparse Mixture of Experts",
    authors="Zewen Chi, Li Dong, Shaohan Huang, Damai Dai, Shuming Ma, Barun Patra, Saksham Singhal, Payal Bajaj, Xia "
    "Song, Xian-Ling Mao, Heyan Huang, Furu Wei",
    year=2022,
    link="https://arxiv.org/abs/2204.09179",
    topics=("mixture of experts", "routing", "representations"),
    parts=("router.cosine",),
    summary="Tokens choose experts by cosine in a space of few dimensions, at a learned temperature, so that routing "
    "does not pull their vectors into the span of the experts'.",
    claims=(SIZES, NO_PULL, STEADIER, APART),
)
