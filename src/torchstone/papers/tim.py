"""Transformers with Competitive Ensembles of Independent Mechanisms (Lamb et al. 2021, arXiv 2103.00336)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchstone.data.two_sources import TwoSourcesSpec
from torchstone.interop.presets import preset
from torchstone.keys import Key
from torchstone.model.block.mechanisms import MechanismsBlock
from torchstone.model.site import initialise
from torchstone.model.taps import Taps
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.papers._claim import Claim, Effect, Measured, Number, Paper, Scale
from torchstone.recipe import Recipe, load_recipe
from torchstone.spec import validate
from torchstone.train import train

__all__ = ["PAPER"]

BUILDS = (
    "torchstone.model.stack.tim",
    "torchstone.model.block.mechanisms",
    "torchstone.model.block.sequential",
)

# ----------------------------------------------------------------------------------------------------- independence

_WIDTH, _TOKENS, _MECHANISMS = 32, 5, 4
_ATTENTIONS: dict[str, dict[str, Any]] = {
    "softmax": {"heads": 4},
    "gated_retention": {"kind": "gated_retention", "heads": 4},
    "mla": {"kind": "mla", "heads": 4, "kv_latent": 16, "nope_dim": 4, "rope_dim": 4, "v_dim": 8},
}


def _model(seed: int, residual: str, attention: dict[str, Any], depth: int, **stack: Any) -> Transformer:
    """Layers of four mechanisms in float64, with weights that make attention and competition uneven."""
    cut = {"kind": "tim", "mechanisms": _MECHANISMS, "plain_first": 0, "plain_last": 0, **stack}
    fields = {"width": _WIDTH, "depth": depth, "vocabulary": 2, "attention": attention, "residual": residual}
    model = validate(TransformerSpec, {**fields, "stack": cut}).build().double()
    initialise(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=Key(seed).fold("tim", name).generator())
            parameter.add_(0.3 * drawn)
    return model


def _influence(model: Transformer, seed: int, fixed: bool) -> torch.Tensor:
    """(T, M, T, M): the largest derivative of what a mechanism is at a position after the last layer by what another
    was at a position before the first; `fixed` holds the shares of the competition."""
    last = f"decoder.layers.{model.spec.depth - 1}.x"
    tokens = torch.zeros(1, _TOKENS, dtype=torch.int64)
    x_TD = torch.randn(_TOKENS, _WIDTH, generator=torch.Generator().manual_seed(seed)).double()

    def stream(x_TD: torch.Tensor) -> torch.Tensor:
        taps = Taps(record=[last], replace={"*.competition": torch.Tensor.detach} if fixed else {})
        model(tokens, embeddings=x_TD[None], taps=taps, outputs="none")
        return taps.seen[last][0]

    jacobian: Any = torch.autograd.functional.jacobian(stream, x_TD)
    return jacobian.abs().unflatten(3, (_MECHANISMS, -1)).unflatten(1, (_MECHANISMS, -1)).amax(dim=(2, 5))


def _independence(scale: Scale, first: int) -> Measured:
    apart = ~torch.eye(_MECHANISMS, dtype=torch.bool)
    found: dict[str, list[float]] = {name: [] for name in ("fixed", "own", "earlier", "same", "communicated")}
    for seed in range(first, first + (1 if scale == "quick" else 3)):
        for residual in ("post", "pre"):
            for attention in _ATTENTIONS.values():
                model = _model(seed, residual, attention, 3, communication=None)
                by = _influence(model, seed, fixed=True).transpose(1, 2)
                found["fixed"].append(float(by[:, :, apart].max()))
                found["own"].append(float(by[-1, 0, ~apart].min()))
            model = _model(seed, residual, _ATTENTIONS["softmax"], 1, communication=None)
            by = _influence(model, seed, fixed=False).transpose(1, 2)[-1][:, apart]
            found["earlier"].append(float(by[:-1].max()))
            found["same"].append(float(by[-1].min()))
            model = _model(seed, residual, _ATTENTIONS["softmax"], 1, competition="none")
            by = _influence(model, seed, fixed=False).transpose(1, 2)[-1][:, apart]
            found["communicated"].append(float(by[:-1].min()))
    return Measured(
        {
            "no communication, competition fixed: another mechanism": max(found["fixed"]),
            "no communication, competition fixed: the mechanism's own first position": min(found["own"]),
            "no communication, one layer: another mechanism at an earlier position": max(found["earlier"]),
            "no communication, one layer: another mechanism at the same position": min(found["same"]),
            "communication, one layer: another mechanism at an earlier position": min(found["communicated"]),
        }
    )


_independence.builds = BUILDS  # type: ignore[attr-defined]

INDEPENDENCE = Claim(
    id="independence",
    kind="identity",
    text="With communication left out and the competition fixed, no mechanism's output depends on another's input, in "
    "three layers of softmax, gated retention or latent attention, norms before or after. The competition reaches "
    "another mechanism at the same position only; communication passes on what another has attended to.",
    figure="mechanisms have parameters of their own and exchange information through attention only",
    gates=(
        Number("no communication, competition fixed: another mechanism", low=0.0, high=0.0),
        Number("no communication, competition fixed: the mechanism's own first position", low=1e-9),
        Number("no communication, one layer: another mechanism at an earlier position", low=0.0, high=0.0),
        Number("no communication, one layer: another mechanism at the same position", low=1e-9),
        Number("communication, one layer: another mechanism at an earlier position", low=1e-9),
    ),
    run=_independence,
)


# ------------------------------------------------------------------------------------------------------- parameters


def _parameters(scale: Scale, first: int) -> Measured:
    layout, numbers = preset("tim-bert-base-layout").dump(), {}
    for mechanisms in (2, 4):
        with torch.device("meta"):
            fields = {**layout, "stack": {**layout["stack"], "mechanisms": mechanisms}}
            encoder = validate(TransformerSpec, fields).build().encoder
        assert encoder is not None
        plain, ours = encoder.layers[0], encoder.layers[2]
        assert isinstance(ours, MechanismsBlock)
        name = f"{mechanisms} mechanisms"
        numbers[f"{name}: matrices of a plain layer over those of one of theirs"] = _matrices(plain) / _matrices(
            ours.mechanisms
        )
        numbers[f"{name}: matrices of the communication"] = _matrices(ours.communication)
        numbers[f"{name}: weights of the competition"] = _matrices(ours.competition)
    return Measured(numbers)


def _matrices(module: torch.nn.Module | None) -> int:
    assert module is not None
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)


_parameters.builds = BUILDS  # type: ignore[attr-defined]

PARAMETERS = Claim(
    id="parameters",
    kind="arithmetic",
    text="At the width of BERT-base a layer of 2 or 4 mechanisms has 2 or 4 times fewer weights in attention and "
    "feed-forward than a plain one. The communication adds 4 d e / mechanisms with e = mechanisms * heads * head_dim, "
    "and the competition d.",
    figure="block-diagonal matrices: d f / mechanisms weights in the place of d f",
    gates=tuple(
        Number(f"{mechanisms} mechanisms: {what}", low=value, high=value)
        for mechanisms in (2, 4)
        for what, value in (
            ("matrices of a plain layer over those of one of theirs", mechanisms),
            ("matrices of the communication", 4 * 768 * 2 * 32),
            ("weights of the competition", 768),
        )
    ),
    run=_parameters,
)

# ---------------------------------------------------------------------------------------------------- two sources


@dataclass(frozen=True)
class _Size:
    """What a scale spends."""

    steps: int
    seeds: int
    control_seeds: int
    rates: tuple[float, ...] = (2e-3,)
    """Learning rates that each arm chooses from, by the loss on other examples of one other seed."""
    examples: int = 256
    precision: str = "fp32"
    data: Mapping[str, Any] = field(default_factory=dict)


_SIZES = {
    "quick": _Size(steps=100, seeds=1, control_seeds=1, examples=64),
    "evidence": _Size(steps=400, seeds=5, control_seeds=3, rates=(1e-3, 2e-3, 4e-3)),
    "gpu": _Size(
        steps=10_000,
        seeds=5,
        control_seeds=3,
        rates=(5e-4, 1e-3, 2e-3),
        precision="bf16",
        data={"symbols": 16, "length": 256},
    ),
}
_TUNING_SEED = 500_000
_TIM: dict[str, Any] = {"width": 64, "attention": {"heads": 4}, "ffn": {"kind": "mlp", "hidden": 256}}
_ARMS: dict[str, dict[str, Any]] = {
    "tim": {**_TIM, "stack": {"kind": "tim", "mechanisms": 2}},
    # narrower, so that it has as many parameters
    "plain": {"width": 60, "attention": {"heads": 6}, "ffn": {"kind": "mlp", "hidden": 256}},
    "without competition": {**_TIM, "stack": {"kind": "tim", "mechanisms": 2, "competition": "none"}},
    # the defect: masks of the diagonal alone
    "diagonal": {**_TIM, "attention": {"heads": 4, "window": 1}, "stack": {"kind": "tim", "mechanisms": 2}},
}


def _recipe(size: _Size, arm: str, seed: int, rate: float) -> dict[str, Any]:
    return {
        "model": {"depth": 6, "residual": "post", "norm": "layernorm", **_ARMS[arm]},
        "data": {"kind": "two_sources", **size.data, "examples": size.examples, "seed": seed},
        "optimizer": {"kind": "adamw", "lr": rate, "weight_decay": 0.0},
        "schedule": {"kind": "cosine", "warmup": 50},
        "trainer": {
            "seed": seed,
            "steps": size.steps,
            "batch": 32,
            "threads": 1,
            "precision": size.precision,
            "compile": "off",
            "save_every": size.steps,
        },
        "evaluate": {"every": size.steps, "blocks": 64, "test": False},
    }


@torch.no_grad()
def _losses(model: Transformer, spec: TwoSourcesSpec, split: str = "test") -> tuple[float, float]:
    """Nats of a pair of next symbols, and of the first source's alone."""
    pair, first, count = 0.0, 0.0, 0
    for batch in getattr(spec.prepare(), split).evaluation(64):
        logits_BTV = model(batch["ids"]).logits
        assert logits_BTV is not None
        shares_BTNN = logits_BTV.float().log_softmax(-1).unflatten(-1, (spec.symbols, spec.symbols))
        next_BT = batch["next"]
        first_BT = (next_BT // spec.symbols)[..., None]
        pair -= float(shares_BTNN.flatten(-2).gather(-1, next_BT[..., None]).sum())
        first -= float(shares_BTNN.logsumexp(-1).gather(-1, first_BT).sum())
        count += next_BT.numel()
    return pair / count, first / count


@torch.no_grad()
def _winners(model: Transformer, spec: TwoSourcesSpec, split: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """By layer, the mechanism with the largest share at each position; and where the first source is informative."""
    informs_BT = spec.informative(split, np.arange(spec.examples))[:, :-1]
    taps = Taps(record=["*.competition"])
    ids_BT = torch.from_numpy(spec.sequences(split, np.arange(spec.examples))[0][:, :-1])
    won: dict[str, list[torch.Tensor]] = {}
    for some_BT in ids_BT.split(64):
        taps.seen.clear()
        model(some_BT, taps=taps, outputs="none")
        for name, share_BTM in taps.seen.items():
            won.setdefault(name, []).append(share_BTM.argmax(-1))
    return {name: torch.cat(parts).numpy() for name, parts in won.items()}, informs_BT


def _bits(won: np.ndarray, informs: np.ndarray) -> float:
    """Mutual information of two series of whole numbers, from the table of their counts."""
    counts = np.zeros((int(won.max()) + 1, 2))
    np.add.at(counts, (won.ravel(), informs.ravel().astype(int)), 1)
    p = counts / counts.sum()
    free = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    return float((p[p > 0] * np.log2(p[p > 0] / free[p > 0])).sum())


def _competed(model: Transformer, spec: TwoSourcesSpec, seed: int) -> dict[str, float]:
    """Bits about the informative source in one layer's winners, on the test split: the layer that knows most of it on
    the validation split. Beside them, what five times as many bits of shuffled winners are."""
    layers, informs = _winners(model, spec, "valid")
    best = max(layers, key=lambda name: _bits(layers[name], informs))
    layers, informs = _winners(model, spec, "test")
    drawn = np.random.default_rng(seed)
    mixed = [_bits(drawn.permutation(layers[best].ravel()), informs) for _ in range(2)]
    return {"bits": _bits(layers[best], informs), "five times shuffled": 5 * mixed[0], "shuffled again": mixed[1]}


def _two_sources(scale: Scale, first: int) -> Measured:
    size, rate = _SIZES[scale], _SIZES[scale].rates[0]
    values: dict[str, dict[int, float]] = {}
    numbers: dict[str, float] = {}
    for arm in _ARMS:
        if len(size.rates) > 1:
            rate = min(size.rates, key=lambda rate: _tuned(size, arm, rate))
        numbers[f"{arm}: learning rate"] = rate
        for seed in range(first, first + (size.seeds if arm in ("tim", "plain") else size.control_seeds)):
            found = _measured(size, arm, seed, rate)
            kept = {arm: found["loss"], f"{arm}: first source": found["first source"]}
            kept |= {f"{arm}: {name}": value for name, value in found.items() if name not in ("loss", "first source")}
            for name, value in kept.items():
                values.setdefault(name, {})[seed] = value
    return Measured(numbers, values)


def _trained(recipe: Recipe) -> Any:
    with tempfile.TemporaryDirectory(prefix="torchstone-tim-") as folder:
        return train(recipe, out=Path(folder) / "run", quiet=True).model().eval()


def _tuned(size: _Size, arm: str, rate: float) -> float:
    """The loss that a learning rate is chosen by."""
    recipe = load_recipe(_recipe(size, arm, _TUNING_SEED, rate))
    return _losses(_trained(recipe), recipe.data, "valid")[0]  # type: ignore[arg-type]


def _measured(size: _Size, arm: str, seed: int, rate: float) -> dict[str, float]:
    recipe = load_recipe(_recipe(size, arm, seed, rate))
    spec: Any = recipe.data
    model = _trained(recipe)
    loss, before = _losses(model, spec)
    found = {"loss": loss, "first source": before}
    for name, grammars in (("second", (0, 1)), ("first", (1, 0))):
        changed = spec.model_copy(update={"grammars": grammars})
        found[f"increase with another {name} grammar"] = _losses(model, changed)[1] - before
    if _ARMS[arm].get("stack", {}).get("competition", "softmax") != "none" and arm != "plain":
        found |= _competed(model, spec, seed)
    return found


_two_sources.builds = (  # type: ignore[attr-defined]
    *BUILDS,
    "torchstone.data._task",
    "torchstone.data.two_sources",
    "torchstone.model.attention.softmax",
    "torchstone.model.residual.post",
)

TWO_SOURCES = Claim(
    id="two-sources",
    kind="behaviour",
    text="Of two sources in one stream, of which one at a time follows its grammar, a 6-layer decoder with two "
    "mechanisms in its layers 2 to 4 predicts both next symbols with at most 0.02 nats more than a plain one of as "
    "many parameters, each at its best of three learning rates. The winners of its competition tell which source is "
    "informative: at least 0.3 bits beyond five times what they do when shuffled, in the layer that is best on other "
    "examples. With another grammar of one source, the loss on the other grows by at most 0.02 nats more than the "
    "plain decoder's. A TIM without competition is measured beside it and no part of the claim.",
    figure="competition follows which of speech and noise is there; better than baselines of as many parameters; "
    "mechanisms that are robust to a change of one of the sources",
    gates=(
        # 0.02 nats: 1 % of what one of the two symbols costs
        Effect("not worse than plain at equal parameters", "tim", "plain", margin=-0.02, sabotage="diagonal"),
        Effect(
            "winners know the informative source",
            "tim: bits",
            "tim: five times shuffled",
            margin=0.3,
            null="tim: shuffled again",
            sabotage="diagonal: bits",
            lower_is_better=False,
        ),
        Effect(
            "not less robust than plain",
            "tim: increase with another second grammar",
            "plain: increase with another second grammar",
            margin=-0.02,
            sabotage="tim: increase with another first grammar",
        ),
    ),
    run=_two_sources,
)

PAPER = Paper(
    slug="tim",
    title="Transformers with Competitive Ensembles of Independent Mechanisms",
    authors="Alex Lamb, Di He, Anirudh Goyal et al., Yoshua Bengio",
    year=2021,
    link="https://arxiv.org/abs/2103.00336",
    topics=("modularity", "parameter efficiency", "interpretability"),
    parts=("stack.tim", "block.mechanisms"),
    summary="Layers in the middle are cut into mechanisms with a slice of the stream, an attention and a feed-forward "
    "each. They compete for how much attention may change them and meet only in an attention across them at each "
    "position.",
    claims=(INDEPENDENCE, PARAMETERS, TWO_SOURCES),
)
