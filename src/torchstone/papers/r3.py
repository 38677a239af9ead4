"""Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers (Ma et al. 2025, arXiv
2510.11370)."""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from torchstone.evaluate.routing import expert_choices
from torchstone.keys import Key
from torchstone.model.context import Context
from torchstone.model.routed import routed_layers
from torchstone.model.taps import Taps
from torchstone.objectives import Batch, Facts, Objective
from torchstone.papers._claim import Claim, Effect, Measured, Number, Paper, Scale, one_thread
from torchstone.recipe import load_recipe
from torchstone.rl.objectives.policy_gradient import PolicyGradient, PolicyGradientSpec
from torchstone.rl.routes import Replay
from torchstone.rl.trajectory import Trajectory
from torchstone.spec import validate
from torchstone.train import RunFolder, train
from torchstone.train.run import build_model
from torchstone.train.training import make_trainer

__all__ = ["PAPER"]

_EXPERTS, _ACTIVE, _VOCABULARY = 8, 2, 40


class _Letters:
    """A tokenizer whose token n is a letter; 0 ends a text."""

    separator, pad = 0, 1

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(96 + token) for token in ids)


def _model(seed: int, router: dict[str, Any]) -> Any:
    ffn = {"kind": "moe", "experts": _EXPERTS, "active": _ACTIVE, "hidden": 24, "router": router}
    body = {"width": 32, "depth": 3, "attention": {"heads": 2}, "ffn": ffn, "residual": {"std": 0.3}}
    layers = [{"at": [1], "ffn": {"kind": "mlp", "hidden": 48}}]
    spec = load_recipe({"model": {**body, "layers": layers, "vocabulary": _VOCABULARY, "context": 64}}).model
    return build_model(spec, seed)


def _objective() -> Any:
    fields = {"group": 4, "rewards": [{"kind": "language", "alphabet": "abcdefghijklm"}], "replay": "rollout",
              "sampling": {"max_new_tokens": 12}, "truncated": "keep"}  # fmt: skip
    spec = validate(PolicyGradientSpec, fields)
    built: Objective = spec.build(Facts(_VOCABULARY, tokenizer=_Letters(), rows={n: {} for n in range(4)}))
    return built


def _gradient(objective: Any, model: Any, batch: Batch) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    objective(model, batch, Key(0)).terms["loss"].total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def _exact(scale: Scale, first: int) -> Measured:
    worst = dict.fromkeys(("own routes: gradient, from that without", "chosen otherwise than installed",
                           "gates, from adding up to 1", "record in another order: gradient"), 0.0)  # fmt: skip
    least = 1.0
    ids = torch.tensor([[0, *(3 + (7 * a + b) % 30 for b in range(5))] for a in range(4)])
    prompts = {"ids": ids, "valid": torch.ones_like(ids, dtype=torch.bool), "example": torch.arange(4)}
    for seed in range(first, first + (1 if scale == "quick" else 3)):
        objective, model = _objective(), _model(seed, {"kind": "topk", "normalise": True}).eval()
        with torch.no_grad():
            batch = objective.collect(model, prompts, Key(seed))
        plain = {name: value for name, value in batch.items() if name != "routes"}
        off = _apart(_gradient(objective, model, batch), _gradient(objective, model, plain))
        worst["own routes: gradient, from that without"] = max(worst["own routes: gradient, from that without"], off)
        # other experts than the live ones
        generator = Key(seed).fold("routes").generator()
        one = torch.randint(0, _EXPERTS, batch["routes"].shape[:-1], generator=generator)
        other = torch.stack([one, (one + 3) % _EXPERTS], -1).to(torch.int16)
        installed = {**batch, "routes": torch.where(batch["valid"][..., None, None], other, -1)}
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        for router in routed_layers(model).values():
            own = router.gate

            def gate(scores: torch.Tensor, chosen: torch.Tensor, own: Any = own, seen: Any = seen) -> torch.Tensor:
                gates: torch.Tensor = own(scores, chosen)
                seen.append((chosen, gates.detach()))
                return gates

            router.__dict__["gate"] = gate
        found = _gradient(objective, model, installed)
        for number, (chosen, gates) in enumerate(seen):
            same = chosen.sort(-1).values == other[:, :, number].long().sort(-1).values
            wrong = float((~same[batch["valid"]]).sum())
            worst["chosen otherwise than installed"] = max(worst["chosen otherwise than installed"], wrong)
            sums = float((gates[batch["valid"]].sum(-1) - 1).abs().max())
            worst["gates, from adding up to 1"] = max(worst["gates, from adding up to 1"], sums)
            least = min(least, float(gates[batch["valid"]].min()))
        turned = _gradient(objective, model, {**installed, "routes": installed["routes"].flip(-1)})
        off = _apart(found, turned)
        worst["record in another order: gradient"] = max(worst["record in another order: gradient"], off)
    return Measured({**worst, "least gate of a recorded expert": least})


_BUILDS = ("torchstone.rl.routes", "torchstone.generate.engine", "torchstone.rl.objectives.policy_gradient")
_exact.builds = (*_BUILDS, "torchstone.rl.trajectory")  # type: ignore[attr-defined]

EXACT = Claim(
    id="replayed-choices",
    kind="identity",
    text="Replayed choices are the recorded ones in every layer; a replay of the choices that the model makes itself "
    "changes no gradient by a bit, nor does the order of a record. Gates of recorded experts add up to 1 and are above "
    "0, also where the live router would have chosen others.",
    figure="eqs. of section 3: I_infer exp(z) / sum of I_infer exp(z)",
    gates=(
        Number("own routes: gradient, from that without", low=0, high=0),
        Number("chosen otherwise than installed", low=0, high=0),
        Number("gates, from adding up to 1", high=1e-5),
        Number("least gate of a recorded expert", low=1e-30),
        Number("record in another order: gradient", low=0, high=0),
    ),
    run=_exact,
)

# ------------------------------------------------------------------------------------------- two engines, one model

_EXTREME = math.log(1.2)
"""Of a token's probability in training over that in the rollout, or the reverse: what counts as far off."""


@dataclass(frozen=True)
class _Text:
    """What a scale spends on a model of text."""

    steps: int
    blocks: int
    seeds: int


_TEXT = {"quick": _Text(steps=5, blocks=4, seeds=1), "evidence": _Text(steps=150, blocks=256, seeds=5)}


def _learned(ffn: dict[str, Any], size: _Text, seed: int) -> tuple[Any, torch.Tensor]:
    """A byte model trained in float32, and held-out text (B, T)."""
    recipe = {
        "model": {"width": 64, "depth": 6, "attention": {"heads": 4}, "ffn": ffn},
        "data": {"corpus": "packages", "tokenizer": "bytes", "block": 64},
        "optimizer": {"kind": "adamw", "lr": 3e-3},
        "schedule": {"kind": "cosine", "warmup": 20},
        "trainer": {**one_thread(size.steps, 16)["trainer"], "seed": seed},
    }
    trainer = make_trainer(load_recipe(recipe))[0]
    for _ in range(size.steps):
        trainer.train_step()
    assert trainer.source.test is not None
    return trainer.model.eval(), next(trainer.source.test.evaluation(size.blocks, size.blocks))["ids"]


def _chosen(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """Experts (B, T, L, K) of each token."""
    found = expert_choices(model, ids_BT)
    return torch.stack([found[path] for path in routed_layers(model)], 2)


@torch.no_grad()
def _disagreement(model: Any, ids_BT: torch.Tensor, key: Key) -> dict[str, tuple[float, float]]:
    """By what routes training takes: ln of the estimate of KL(rollout || train) and the share of tokens that are far
    off. The rollout is the same weights in bfloat16, and draws one token after each of `ids_BT`."""
    engine = copy.deepcopy(model).to(torch.bfloat16)
    logq_BTV = engine(ids_BT).logits.float().log_softmax(-1)
    drawn_N = torch.multinomial(logq_BTV.exp().flatten(0, 1), 1, generator=key.generator())
    drawn_BT1 = drawn_N.view(*ids_BT.shape, 1)

    def look(taps: Taps | None = None) -> tuple[float, float]:
        logp_BTV = model(ids_BT, taps=taps).logits.log_softmax(-1)
        gap = (logp_BTV.gather(-1, drawn_BT1) - logq_BTV.gather(-1, drawn_BT1)).double()
        return math.log((torch.expm1(gap) - gap).mean()), (gap.abs() > _EXTREME).double().mean().item()

    found = {"live": look()}
    if routed_layers(model):
        routes, own = _chosen(engine, ids_BT), _chosen(model, ids_BT)
        apart = (routes.sort(-1).values != own.sort(-1).values).any(-1).double()
        arms = {"replayed": routes, "own routes": own, "routes of the token before": routes.roll(1, 1)}
        everywhere = torch.ones_like(ids_BT, dtype=torch.bool)
        found |= {arm: look(Replay(model, each, everywhere).taps) for arm, each in arms.items()}
        found["apart"] = apart.mean().item(), apart.amax(-1).mean().item()
    return found


def _mismatch(scale: Scale, first: int) -> Measured:
    size = _TEXT[scale]
    values: dict[str, dict[int, float]] = {}
    apart: list[tuple[float, float]] = []
    experts = {"kind": "moe", "experts": 16, "active": 2, "hidden": 64, "router": {"kind": "topk", "normalise": True}}
    for seed in range(first, first + size.seeds):
        key = Key(seed).fold("tokens")
        found = _disagreement(*_learned(experts, size, seed), key)
        apart.append(found.pop("apart"))
        found["dense"] = _disagreement(*_learned({"kind": "mlp", "hidden": 256}, size, seed), key)["live"]
        for arm, (kl, far) in found.items():
            values.setdefault(f"{arm}: ln KL", {})[seed] = kl
            values.setdefault(f"{arm}: tokens off by 1.2", {})[seed] = far
    layers, tokens = (sum(each) / len(apart) for each in zip(*apart, strict=True))
    return Measured({"router decisions that differ": layers, "tokens with one that differs": tokens}, values)


_ROUTED = (
    "torchstone.rl.routes",
    "torchstone.model.routed",
    "torchstone.model.feedforward.moe",
    "torchstone.model.feedforward.router",
    "torchstone.model.feedforward.router.topk",
    "torchstone.model.feedforward.router._scored",
)
_mismatch.builds = (*_ROUTED, "torchstone.evaluate.routing")  # type: ignore[attr-defined]

MISMATCH = Claim(
    id="two-precisions",
    kind="behaviour",
    text="A byte model of six layers, each of 16 experts of which two are taken, is trained in float32 and draws "
    "tokens in bfloat16. With the drawn tokens' routes replayed, the estimated KL(rollout || train) is at most half of "
    "that with live routing, and at most twice that of a dense model; fewer tokens are more or less likely by a factor "
    "of 1.2. Training's own routes replayed do nothing, and routes of the token before do harm.",
    figure="Qwen3-30B-A3B: 10 % of router decisions and 94 % of tokens differ; KL 1.5e-3 without and 7.5e-4 with "
    "replay, 6.4e-4 of a dense model; tokens that are far off fall by an order of magnitude",
    gates=(
        Effect(
            "at most half of the divergence, in ln",
            "replayed: ln KL",
            "live: ln KL",
            margin=math.log(2),
            null="own routes: ln KL",
            sabotage="routes of the token before: ln KL",
        ),
        Effect(
            "at most twice that of a dense model, in ln",
            "replayed: ln KL",
            "dense: ln KL",
            margin=-math.log(2),
            sabotage="routes of the token before: ln KL",
        ),
        Effect(
            "fewer tokens that are far off",
            "replayed: tokens off by 1.2",
            "live: tokens off by 1.2",
            margin=0.0,
            null="own routes: tokens off by 1.2",
            sabotage="routes of the token before: tokens off by 1.2",
        ),
    ),
    run=_mismatch,
)

# ----------------------------------------------------------------------------------------- a rollout with other routers


class NoisySpec(PolicyGradientSpec):
    """Answers are written under noise on router logits, as by another engine; training and measuring have none."""

    kind: ClassVar[str] = "policy_gradient_noisy"
    offered: ClassVar[bool] = False

    noise: float = 0.0
    """Its standard deviation."""
    turned: bool = False
    """A defect: each token has the recorded routes of the one before it."""

    def build(self, facts: Facts) -> Objective:
        return _Noisy(self, facts)


class _Noisy(PolicyGradient):
    spec: NoisySpec

    def _answers(self, model: nn.Module, batch: Batch, count: int, key: Key, routes: bool = False) -> list[Trajectory]:
        if count == 1:  # to measure
            return super()._answers(model, batch, count, key, routes)
        with _noise(model, self.spec.noise, key.fold("routers")):
            found = super()._answers(model, batch, count, key, routes)
        if not self.spec.turned:
            return found
        return [replace(each, routes=np.roll(each.routes, 1, 0)) for each in found if each.routes is not None]


@contextmanager
def _noise(model: nn.Module, std: float, key: Key) -> Iterator[None]:
    """Noise on the logits of all routers of a softmax."""
    generator, routers = key.generator(), routed_layers(model).values()
    for router in routers if std else ():
        own = router.score

        def score(x_BTD: torch.Tensor, ctx: Context, own: Any = own) -> torch.Tensor:
            scores_BTE: torch.Tensor = own(x_BTD, ctx)
            return (scores_BTE.log() + std * torch.randn(scores_BTE.shape, generator=generator)).softmax(-1)

        router.__dict__["score"] = score
    try:
        yield
    finally:
        for router in routers:
            router.__dict__.pop("score", None)


@dataclass(frozen=True)
class _Size:
    """What a scale spends on policies: `steps` of which the last `late` say what a policy has come to."""

    first_steps: int
    steps: int
    late: int
    batch: int
    measured: int
    seeds: int
    other_seeds: int
    rates: tuple[float, ...]


_SIZES = {
    "quick": _Size(5, steps=2, late=2, batch=4, measured=16, seeds=1, other_seeds=1, rates=(2e-4,)),
    "evidence": _Size(600, 150, late=40, batch=16, measured=200, seeds=5, other_seeds=3, rates=(1e-4, 2e-4, 4e-4)),
}
_BELOW, _LONGEST, _BLOCK = 30, 3, 12
"""Numbers that are added are below; tokens of an answer with its end, and of all."""
_STD = 0.3
"""Of the noise on logits."""
_TUNING, _AGAIN = 100_000, 200_000
"""Distances of the seed that the learning rate is chosen on, and of seeds that draw anew."""
_ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "truncated weights": {"correction": "truncate", "cap": 2.0},
    "own routes": {"replay": "trainer"},
    "rollout's routes": {"replay": "rollout"},
}
"""GRPO, with weights for the rollout's probabilities, with the trainer's routes (R2) and with the rollout's (R3)."""


def _write(folder: Path, size: _Size, seed: int) -> None:
    """Sums to tune and train on, and others to measure with."""
    pairs = Key(seed).fold("sums").numpy().permutation(_BELOW * _BELOW)
    rows = [{"prompt": f"{n // _BELOW}+{n % _BELOW}=", "answer": str(n // _BELOW + n % _BELOW)} for n in pairs.tolist()]
    rows = [{**row, "response": row["answer"]} for row in rows]
    for name, some in (("valid", rows[: size.measured]), ("sums", rows[size.measured :])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


def _tuned(folder: Path, size: _Size, seed: int) -> RunFolder:
    """A model of experts that can add a little."""
    router = {"kind": "topk", "normalise": True}
    recipe: dict[str, Any] = {
        "model": {"width": 48, "depth": 2, "attention": {"heads": 4},
                  "ffn": {"kind": "moe", "experts": 8, "active": 2, "hidden": 48, "router": router}},
        "data": {"kind": "responses", "path": str(folder / "sums.jsonl"), "block": _BLOCK, "tokenizer": "bytes",
                 "cache": str(folder / "cache")},
        "optimizer": {"lr": 3e-3},
        "schedule": {"kind": "cosine", "warmup": 20},
        **one_thread(size.first_steps, 64, blocks=64),
    }  # fmt: skip
    recipe["trainer"] |= {"seed": seed, "device": "cpu"}
    recipe["evaluate"] |= {"test": False}
    return train(recipe, out=folder / "tuned", quiet=True)


def _policy(
    folder: Path, size: _Size, seed: int, base: RunFolder, lr: float, std: float, **fields: Any
) -> tuple[float, float, float]:
    """Of one training: the mean over steps of the estimated KL(rollout || train), the mean reward of the last steps,
    and the share of right answers to held-out sums."""
    recipe: dict[str, Any] = {
        "init_from": str(base.path),
        "data": {"kind": "prompts", "path": str(folder / "sums.jsonl"), "valid": str(folder / "valid.jsonl"),
                 "block": _BLOCK, "cache": str(folder / "cache")},
        "objective": {"kind": NoisySpec.kind, "group": 8, "rewards": [{"kind": "exact"}], "rounds": 2,
                      "sampling": {"max_new_tokens": _LONGEST}, "noise": std, **fields},
        "optimizer": {"lr": lr, "weight_decay": 0.0},
        "schedule": {"kind": "linear", "warmup": 10},
        **one_thread(size.steps, size.batch, blocks=size.measured),
    }  # fmt: skip
    recipe["trainer"] |= {"seed": seed, "device": "cpu", "log_every": 1}
    recipe["evaluate"] |= {"test": False}
    rows = train(recipe, out=folder / f"policy {len(list(folder.iterdir()))}", quiet=True).metrics()
    kl, reward = (np.array([row[name] for row in rows if name in row]) for name in ("sampler_kl", "reward"))
    right = [float(row["valid_pass@1"]) for row in rows if "valid_pass@1" in row][-1]
    return float(kl.mean()), float(reward[-size.late :].mean()), right


def _begun(folder: Path, size: _Size, seed: int) -> RunFolder:
    _write(folder, size, seed)
    return _tuned(folder, size, seed)


def _rate(size: _Size, seed: int) -> float:
    """The learning rate that policy gradients without replay get the most reward with."""
    if len(size.rates) == 1:
        return size.rates[0]
    with tempfile.TemporaryDirectory(prefix="torchstone-r3-") as name:
        folder = Path(name)
        base = _begun(folder, size, seed)
        return max(size.rates, key=lambda lr: _policy(folder, size, seed, base, lr, _STD)[1])


def _training(scale: Scale, first: int) -> Measured:
    size = _SIZES[scale]
    lr = _rate(size, first + _TUNING)
    values: dict[str, dict[int, float]] = {}
    for seed in range(first, first + size.seeds):
        runs = {"plain": (seed, _STD, _ARMS["plain"]), "rollout's routes": (seed, _STD, _ARMS["rollout's routes"])}
        if seed < first + size.other_seeds:
            runs |= {arm: (seed, _STD, fields) for arm, fields in _ARMS.items()}
            runs |= {f"{arm}, no noise": (seed, 0.0, fields) for arm, fields in _ARMS.items()}
            runs |= {"plain again": (seed + _AGAIN, _STD, _ARMS["plain"])}
            runs |= {"routes of the token before": (seed, _STD, {"replay": "rollout", "turned": True})}
        with tempfile.TemporaryDirectory(prefix="torchstone-r3-") as name:
            folder = Path(name)
            base = _begun(folder, size, seed)
            for arm, (drawn, std, fields) in runs.items():
                kl, reward, right = _policy(folder, size, drawn, base, lr, std, **fields)
                found = {"ln KL": math.log(max(kl, 1e-300)), "reward": reward, "right": right}
                for what, value in found.items():
                    values.setdefault(f"{arm}: {what}", {})[seed] = value
    replayed = [f"{arm}, no noise: reward" for arm in _ARMS if arm != "plain"]
    calm = [abs(reward - values["plain, no noise: reward"][n]) for arm in replayed for n, reward in values[arm].items()]
    return Measured({"learning rate": lr, "without noise: reward, farthest from plain": max(calm)}, values)


_training.builds = (  # type: ignore[attr-defined]
    *_BUILDS,
    *_ROUTED,
    "torchstone.rl.advantage",
    "torchstone.rl.logprobs",
    "torchstone.rl.rollout",
    "torchstone.rl.trajectory",
    "torchstone.rl.data.prompts",
    "torchstone.data.responses",
    "torchstone.rl.reward.exact",
)

TRAINING = Claim(
    id="noisy-routers",
    kind="behaviour",
    text="A model of two layers of eight experts, of which two are taken, is tuned on sums and trained by policy "
    "gradients whose answers are written under noise of 0.3 on router logits, which training does not have; at the "
    "learning rate of three that suits them best without replay. With the rollout's routes the estimated KL(rollout || "
    "train) is at most half of that without replay, in the mean over steps, and rewards of the last 40 of 150 steps "
    "are at most 0.03 less. Routes of the token before do neither. Without noise no way to replay or to weigh changes "
    "rewards by more than 0.03. Training's own routes and truncated weights are measured beside it.",
    figure="three of three trainings without replay collapse and none with it; mean score of 71.8 against 62.2",
    gates=(
        Effect(
            "at most half of the divergence, in ln",
            "rollout's routes: ln KL",
            "plain: ln KL",
            margin=math.log(2),
            null="plain again: ln KL",
            sabotage="routes of the token before: ln KL",
        ),
        Effect(
            "rewards are at most 0.03 less",
            "rollout's routes: reward",
            "plain: reward",
            margin=-0.03,
            sabotage="routes of the token before: reward",
            lower_is_better=False,
        ),
        Number("without noise: reward, farthest from plain", high=0.03),
    ),
    run=_training,
)


PAPER = Paper(
    slug="r3",
    title="Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers",
    authors="Wenhan Ma, Hailin Zhang, Liang Zhao, and others",
    year=2025,
    link="https://arxiv.org/abs/2510.11370",
    topics=("reinforcement learning", "mixture of experts"),
    parts=("objective.policy_gradient",),
    summary="Experts that tokens were sent to while an answer was written are those that they are sent to when it is "
    "trained on; gates stay live.",
    claims=(EXACT, MISMATCH, TRAINING),
)
