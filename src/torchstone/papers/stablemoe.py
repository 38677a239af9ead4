"""StableMoE: Stable Routing Strategy for Mixture of Experts (Dai et al. 2022, arXiv 2204.08396)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from torchstone.evaluate.routing import expert_choices, routing_fluctuation
from torchstone.keys import Key
from torchstone.model.context import Context
from torchstone.model.feedforward.router import Router
from torchstone.model.feedforward.router.stable import StableRouter, StableSpec
from torchstone.model.site import Site, initialise
from torchstone.model.tokens import Tokens
from torchstone.papers._claim import Claim, Effect, Measured, Number, Paper, Scale, one_thread
from torchstone.recipe import load_recipe
from torchstone.train.engine import Trainer
from torchstone.train.training import make_trainer

__all__ = ["PAPER"]

BUILDS = ("torchstone.model.feedforward.router.stable", "torchstone.model.feedforward.router")


def _trainer(
    model: Mapping[str, Any], data: Mapping[str, Any], seed: int, rate: float, steps: int, batch: int
) -> Trainer:
    recipe = {
        "model": model,
        "data": data,
        "optimizer": {"kind": "adamw", "lr": rate, "weight_decay": 0.1},
        "schedule": {"kind": "cosine", "warmup": 20},
        "trainer": {**one_thread(steps, batch)["trainer"], "seed": seed},
    }
    return make_trainer(load_recipe(recipe))[0]


# ---------------------------------------------------------------------------------------------------------- arithmetic


def _sizes(scale: Scale, first: int) -> Measured:
    with torch.device("meta"):
        router: Any = StableSpec().build(Site(width=768, vocabulary=50_000), 32, 1)
    return Measured(
        {
            "parameters of the small router": router.words.numel() + router.distilled.numel(),
            "those that a token meets": router.distilled.numel() + router.words.numel() - router.inactive_parameters,
            "steps of stage 1": router.spec.distill_steps,
        }
    )


_sizes.builds = BUILDS  # type: ignore[attr-defined]

SIZES = Claim(
    id="router-size",
    kind="arithmetic",
    text="For 50,000 token ids and 32 experts the router that is distilled has 50 (V + N) parameters, two and a half "
    "million, of which a token meets 50 (1 + N); the first stage takes 6,000 steps, a tenth of the paper's 60,000.",
    figure="word embeddings of 50 dimensions; 6,000 of 60,000 updates",
    gates=(
        Number("parameters of the small router", low=2_501_600, high=2_501_600),
        Number("those that a token meets", low=1_650, high=1_650),
        Number("steps of stage 1", low=6_000, high=6_000),
    ),
    run=_sizes,
)

# ------------------------------------------------------------------------------------------------------------ identity


_D, _V, _N = 16, 60, 4


def _router(seed: int) -> StableRouter:
    """A router of uneven weights in float64."""
    router: Any = initialise(StableSpec(distill_steps=1).build(Site(width=_D, vocabulary=_V), _N, 1), seed).double()
    with torch.no_grad():
        for number, parameter in enumerate(router.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=Key(seed).fold(number).generator()).double())
    return router


def _losses(seed: int) -> dict[str, float]:
    """What each loss moves, and where to."""
    router, tokens = _router(seed), Tokens.of(torch.randint(_V, (2, 32), generator=Key(seed).generator()))
    ctx = Context(tokens, tokens)
    x = torch.randn(2, 32, _D, generator=Key(seed).fold("x").generator()).double().requires_grad_()
    routing, valid_BT = router(x, ctx), torch.ones(2, 32, dtype=torch.bool)
    inputs = {"stream": x, "scores": router.weight, "small": router.words, "smaller": router.distilled}

    def reached(loss: torch.Tensor) -> dict[str, bool]:
        grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, retain_graph=True)
        return {name: g is not None and bool(g.any()) for name, g in zip(inputs, grads, strict=True)}

    distilling, task = reached(routing.losses["distill_loss"]), reached(routing.gates.sum())
    wrong = distilling["stream"] + distilling["scores"] + (not distilling["small"]) + (not distilling["smaller"])
    wrong += task["small"] + task["smaller"] + (not task["stream"]) + (not task["scores"])
    scores = router.score(x, ctx).detach().requires_grad_()
    (to_scores,) = torch.autograd.grad(router.losses(scores, routing, valid_BT, ctx)["balance_loss"], scores)
    counts_E, chosen_BT = routing.counts.sum(0), routing.experts[..., 0]
    over_BT = torch.sign(counts_E - counts_E.mean())[chosen_BT]
    against = torch.sign(to_scores.gather(-1, routing.experts)[..., 0]) != over_BT
    even = replace(routing, counts=torch.full_like(routing.counts, 64 / 2 / _N))
    return {
        "gradients that a loss should not give, or should and does not": float(wrong),
        "scores that the balance loss pushes the wrong way": float(against.sum()),
        "balance loss of even counts": float(router.losses(scores, even, valid_BT, ctx)["balance_loss"].detach().abs()),
    }


_TINY: dict[str, Any] = {"width": 16, "depth": 2, "attention": {"heads": 2}}


def _frozen(seed: int) -> dict[str, float]:
    """A training of 100 steps after the first stage, with weight decay."""
    moe = {"kind": "moe", "experts": _N, "active": 1, "hidden": 16, "router": {"kind": "stable", "distill_steps": 20}}
    trainer = _trainer({**_TINY, "ffn": moe}, {"kind": "recall"}, seed, 1e-2, 121, 8)
    model: Any = trainer.model
    for _ in range(21):
        trainer.train_step()
    V = model.spec.vocabulary
    ids_BT = torch.randint(V, (64, 16), generator=Key(seed).generator())
    routers = [layer.ffn.router for layer in model.decoder.layers]
    held = [(r.words.clone(), r.distilled.clone(), r.table.clone(), r.weight.detach().clone()) for r in routers]
    before = expert_choices(model, ids_BT)
    for _ in range(100):
        trainer.train_step()
    after = expert_choices(model, ids_BT)
    moved = sum(
        int((now != then).sum())
        for r, (words, distilled, table, _) in zip(routers, held, strict=True)
        for now, then in ((r.words, words), (r.distilled, distilled), (r.table, table))
    )
    beside = 0
    for r, experts_BTK in zip(routers, after.values(), strict=True):
        table_V = (r.words @ r.distilled.T).argmax(-1)
        beside += int((experts_BTK[..., 0] != table_V[ids_BT]).sum())
    return {
        "share of choices that change in 100 steps of stage 2": max(routing_fluctuation(before, after).values()),
        "numbers of the small router and its table that move": float(moved),
        "choices beside the table, at any position and in any text": float(beside),
        "layers whose gates stop learning": float(
            sum(torch.equal(r.weight, weight) for r, (*_, weight) in zip(routers, held, strict=True))
        ),
    }


def _table(scale: Scale, first: int) -> Measured:
    found: dict[str, list[float]] = {}
    for seed in range(first, first + (1 if scale == "quick" else 5)):
        for name, value in (_losses(seed) | _frozen(seed)).items():
            found.setdefault(name, []).append(value)
    return Measured({name: max(values) for name, values in found.items()})


_table.builds = (  # type: ignore[attr-defined]
    *BUILDS,
    "torchstone.model.feedforward.moe",
    "torchstone.evaluate.routing",
    "torchstone.train.engine",
)

TABLE = Claim(
    id="frozen-table",
    kind="identity",
    text="In the second stage an expert is a constant of the token's id: no choice changes, in any text or position, "
    "nothing of the small router moves in 100 steps with weight decay, and gates go on learning. Distillation gives no "
    "gradient to what it learns from, the task none to what learns; the balance loss pushes scores of too full experts "
    "down and of others up, and is 0 at balance.",
    figure="equations 3 to 7; no fluctuation in the second stage",
    gates=tuple(
        Number(name, high=0)
        for name in (
            "share of choices that change in 100 steps of stage 2",
            "numbers of the small router and its table that move",
            "choices beside the table, at any position and in any text",
            "layers whose gates stop learning",
            "gradients that a loss should not give, or should and does not",
            "scores that the balance loss pushes the wrong way",
            "balance loss of even counts",
        )
    ),
    run=_table,
)

# ------------------------------------------------------------------------------------------------------------ training


class AdriftSpec(StableSpec):
    """Training goes on by the learned scores in the second stage, while evaluation goes by the table: for the claim's
    sabotage arm."""

    kind: ClassVar[str] = "stable_adrift"
    offered: ClassVar[bool] = False

    def build(self, site: Site, experts: int, active: int) -> Router:
        assert site.vocabulary is not None
        return _Adrift(self, site, site.vocabulary, experts)


class _Adrift(StableRouter):
    def select(self, scores_BTE: torch.Tensor, ctx: Context) -> torch.Tensor:
        return scores_BTE.argmax(-1, keepdim=True) if self.training else super().select(scores_BTE, ctx)


@dataclass(frozen=True)
class _Size:
    """What a scale spends."""

    steps: int
    seeds: int
    control_seeds: int
    rates: tuple[float, ...]
    balances: tuple[float, ...] = (0.01,)
    """Of Switch's balance loss."""


_SIZES = {
    "quick": _Size(steps=60, seeds=1, control_seeds=1, rates=(4e-3,)),
    "evidence": _Size(steps=400, seeds=5, control_seeds=3, rates=(2e-3, 4e-3, 8e-3), balances=(0.01, 0.1)),
}
_TUNING_SEED = 500_000
_SHIFT = 100_000


def _routers(size: _Size) -> dict[str, dict[str, Any]]:
    stage = {"distill_steps": size.steps // 10}
    return {
        "switch": {"kind": "topk"},
        "stable": {"kind": "stable", **stage},
        "adrift": {"kind": "stable_adrift", **stage},
        "hash": {"kind": "hash"},
        "hash with gates": {"kind": "hash", "gating": "sigmoid"},
    }


def _measured(
    size: _Size, router: Mapping[str, Any], seed: int, rate: float, split: str = "test"
) -> tuple[float, float, float]:
    """Nats a token, the share of held-out tokens whose expert changes in the second half of training, and the load of
    the fullest expert at its end, over the mean."""
    moe = {"kind": "moe", "experts": 8, "active": 1, "hidden": 256, "gated": False, "router": router}
    model = {
        "width": 64,
        "depth": 3,
        "attention": {"heads": 4},
        "ffn": {"kind": "mlp", "hidden": 256},
        "layers": [{"at": [1], "ffn": moe}],
    }
    data = {"corpus": "packages", "tokenizer": {"kind": "bpe", "vocabulary": 1024}, "block": 64}
    trainer = _trainer(model, data, seed, rate, size.steps, 16)
    assert trainer.source.valid is not None
    ids_BT = next(trainer.source.valid.evaluation(32, 32))["ids"]
    half = {}
    for step in range(1, size.steps + 1):
        trainer.train_step()
        if step == size.steps // 2:
            half = expert_choices(trainer.model, ids_BT)
    end = expert_choices(trainer.model, ids_BT)
    (changed,), (experts,) = routing_fluctuation(half, end).values(), end.values()
    load = torch.bincount(experts.flatten(), minlength=8).double()
    loss = trainer.measure_split(getattr(trainer.source, split), split, 512)[f"{split}_loss"]
    return loss, changed, float(load.max() / load.mean())


def _stable(scale: Scale, first: int) -> Measured:
    size = _SIZES[scale]
    values: dict[str, dict[int, float]] = {}
    numbers: dict[str, float] = {}
    changed: dict[str, list[float]] = {}
    chosen: dict[str, tuple[float, dict[str, Any]]] = {}
    for arm, router in _routers(size).items():
        # what is not compared takes the learning rate of its like
        like = {"adrift": "stable", "hash": "stable", "hash with gates": "stable"}.get(arm)
        grid = [(rate, router) for rate in (size.rates if like is None else [chosen[like][0]])]
        if arm == "switch":
            grid = [(rate, {**router, "balance": b}) for rate, b in itertools.product(size.rates, size.balances)]
        if len(grid) > 1:
            losses = [_measured(size, router, _TUNING_SEED, rate, "valid")[0] for rate, router in grid]
            grid = [grid[losses.index(min(losses))]]
        ((rate, router),) = grid
        chosen[arm] = rate, dict(router)
        numbers[f"{arm}: learning rate"] = rate
        seeds = {arm: range(first, first + (size.control_seeds if arm == "adrift" else size.seeds))}
        if arm == "switch":
            numbers["switch: weight of the balance loss"] = router["balance"]
            seeds["switch again"] = range(first + _SHIFT, first + _SHIFT + size.control_seeds)
        for name, some in seeds.items():
            for seed in some:
                loss, share, load = _measured(size, router, seed, rate)
                changed.setdefault(name, []).append(share)
                values.setdefault(name, {})[seed] = loss
                values.setdefault(f"{name}: changed", {})[seed] = share
                values.setdefault(f"{name}: load", {})[seed] = load
    numbers["stable: largest share of tokens whose expert changes"] = max(changed["stable"])
    numbers["switch: least share of tokens whose expert changes"] = min(changed["switch"])
    return Measured(numbers, values)


_stable.builds = (  # type: ignore[attr-defined]
    *BUILDS,
    "torchstone.model.feedforward.moe",
    "torchstone.model.feedforward.router.hash",
    "torchstone.model.feedforward.router._scored",
    "torchstone.model.feedforward.router.topk",
    "torchstone.evaluate.routing",
)

STABLE = Claim(
    id="stable-and-as-good",
    kind="behaviour",
    text="In a model of 1,024 tokens with 8 experts of which one is taken, Switch changes the expert of a tenth or "
    "more of the held-out tokens in the second half of training and StableMoE, frozen after a tenth of it, of none; "
    "and StableMoE's loss is lower. Both at their best of three learning rates, Switch also of two weights of its "
    "balance loss. Hash layers, with the same gates and without, and the load of the fullest expert are measured "
    "beside it and no part of the claim.",
    figure="lower perplexity than Switch, BASE and Hash layers, with no fluctuation after the first stage",
    gates=(
        Number("stable: largest share of tokens whose expert changes", high=0),
        Number("switch: least share of tokens whose expert changes", low=0.1),
        Effect("lower loss than Switch", "stable", "switch", margin=0.0, null="switch again", sabotage="adrift"),
    ),
    run=_stable,
)

PAPER = Paper(
    slug="stablemoe",
    title="StableMoE: Stable Routing Strategy for Mixture of Experts",
    authors="Damai Dai, Li Dong, Shuming Ma, Bo Zheng, Zhifang Sui, Baobao Chang, Furu Wei",
    year=2022,
    link="https://arxiv.org/abs/2204.08396",
    topics=("mixture of experts", "routing", "distillation"),
    parts=("router.stable",),
    summary="Routing is learned first and distilled into a small router that reads the token's id alone; then it is "
    "frozen, and a token always has the same expert.",
    claims=(SIZES, TABLE, STABLE),
)
