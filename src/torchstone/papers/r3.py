"""Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers (Ma et al. 2025, arXiv
2510.11370)."""

from __future__ import annotations

from typing import Any

import torch

from torchstone.keys import Key
from torchstone.model.routed import routed_layers
from torchstone.objectives import Batch, Facts, Objective
from torchstone.papers._claim import Claim, Measured, Number, Paper, Scale
from torchstone.recipe import load_recipe
from torchstone.rl.objectives.policy_gradient import PolicyGradientSpec
from torchstone.spec import validate
from torchstone.train.run import build_model

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
    claims=(EXACT,),
)
