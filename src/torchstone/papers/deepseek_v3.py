"""DeepSeek-V3 (DeepSeek-AI 2024, arXiv 2412.19437): experts balanced without a loss, multi-token prediction, training
in 8 bits."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from torchstone.generate import Engine, Sampling
from torchstone.interop.presets import preset
from torchstone.keys import Key
from torchstone.model.context import Context, add_aux
from torchstone.model.feedforward.router import Router
from torchstone.model.feedforward.router.sigmoid_bias import SigmoidBiasRouter, SigmoidBiasSpec
from torchstone.model.linear import Bias, Linear
from torchstone.model.linear.fp8_block import FP8BlockSpec, FP8Linear
from torchstone.model.site import Initialise, Site, initialise
from torchstone.model.stack.multi_token import predict, predictors_of
from torchstone.model.tokens import Tokens
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.objectives import Batch, Facts, Objective, Result, Term, tokens_of
from torchstone.objectives.causal_lm import CausalLM, vocabulary_loss
from torchstone.objectives.multi_token import MultiToken, MultiTokenSpec, further_targets
from torchstone.ops.fp8 import dequantise, quantise
from torchstone.papers._claim import Arms, Claim, Effect, Measured, Number, Paper, Scale, Setting, one_thread
from torchstone.recipe import load_recipe
from torchstone.spec import validate
from torchstone.train import train
from torchstone.train.run import RunFolder

__all__ = ["PAPER"]


# ------------------------------------------------------------------------------------------------------- identities


def _model(predictors: int, seed: int, std: float = 0.3) -> Transformer:
    fields: dict[str, Any] = {
        "width": 32,
        "depth": 2,
        "vocabulary": 61,
        "attention": {"kind": "mla", "heads": 4, "kv_latent": 16, "nope_dim": 8, "rope_dim": 4, "v_dim": 8},
        "ffn": {"kind": "moe", "experts": 8, "hidden": 16, "shared": 1, "router": "sigmoid_bias"},
        "residual": {"kind": "pre", "std": std},
        "stack": {"kind": "multi_token", "predictors": predictors},
    }
    return initialise(validate(TransformerSpec, fields).build(), seed)  # type: ignore[return-value]


def _batch(seed: int, rows: int = 4, length: int = 24) -> Batch:
    ids = torch.randint(61, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return {"ids": ids[:, :-1], "next": ids[:, 1:]}


def _gradients(objective: Objective, model: Transformer, batch: Batch) -> dict[str, torch.Tensor]:
    result = objective(model, batch, None)
    total = sum((term.weight * term.total for term in result.terms.values()), torch.zeros(()))
    total.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": total.detach(), **grads}


@torch.no_grad()
def _predicted(model: Transformer, ids_BT: torch.Tensor) -> list[torch.Tensor]:
    """What each module gives to the head."""
    hidden, found = model(ids_BT, outputs="none").hidden, []
    for k in range(1, len(predictors_of(model) or ()) + 1):
        hidden, _ = predict(model, k, hidden[:, : ids_BT.shape[1] - k], Tokens.of(ids_BT[:, k:]))
        found.append(hidden)
    return found


def _sees_too_much(seed: int) -> int:
    """Predictions that change with a token after the last that they may read, or do not with that one."""
    model, ids, wrong = _model(2, seed), _batch(seed)["ids"], 0
    before = _predicted(model, ids)
    for at in range(ids.shape[1]):
        other = ids.clone()
        other[:, at] = (other[:, at] + 1) % 61
        for k, (a, b) in enumerate(zip(before, _predicted(model, other), strict=True), 1):
            differs = (a != b).any(-1)
            wrong += int(differs[:, : max(0, at - k)].sum()) + int(
                (~differs[:, at - k : at - k + 1]).sum() if at >= k else 0
            )
    return wrong


def _drafts_change(seed: int) -> int:
    """Tokens that drafts change, greedy and sampled, of rows that accept different numbers of them."""
    changed = 0
    for std, sampling in (
        (0.3, Sampling(temperature=0, max_new_tokens=40)),
        (0.08, Sampling(max_new_tokens=40, seed=seed)),
    ):
        model = _model(2, seed, std)
        prompts = [row[: 3 + 4 * b].tolist() for b, row in enumerate(_batch(seed)["ids"])]
        both = [Engine(model, draft=draft, compile="off").generate(prompts, sampling) for draft in ("mtp", None)]
        changed += sum(x != y for a, b in zip(*both, strict=True) for x, y in zip(a.ids, b.ids, strict=True))
    return changed


@torch.no_grad()
def _bias_in_gates(seed: int) -> float:
    """Largest change of a gate when a bias moves, of tokens whose choices stay."""
    router: Any = initialise(SigmoidBiasSpec(scale=2.5).build(Site(width=32), 16, 2), seed)
    router.weight.normal_(0, 0.3, generator=Key(seed).fold("weight").generator())
    x = torch.randn(4, 32, 32, generator=Key(seed).fold("x").generator())
    before = router(x, Context.alone(x))
    router.bias.normal_(0, 0.02, generator=Key(seed).fold("bias").generator())
    after = router(x, Context.alone(x))
    (a, i), (b, j) = (made.experts.sort(-1) for made in (before, after))
    same = (a == b).all(-1)
    assert 0 < same.float().mean() < 1
    return float((before.gates.gather(-1, i) - after.gates.gather(-1, j))[same].abs().max())


def _identities(scale: Scale, first: int) -> Measured:
    plain_differs = too_much = changed = 0
    gates = rounding = 0.0
    for seed in range(first, first + (1 if scale == "quick" else 5)):
        wanted, found = (_gradients(objective, _model(0, seed), _batch(seed))
                         for objective in (CausalLM(), MultiToken(MultiTokenSpec())))  # fmt: skip
        plain_differs += sum(not torch.equal(found[name], value) for name, value in wanted.items())
        too_much += _sees_too_much(seed)
        changed += _drafts_change(seed)
        gates = max(gates, _bias_in_gates(seed))
        x = torch.randn(64, 512, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()
        q, size = quantise(x)
        off = (dequantise(q, size) / x - 1).abs()
        rounding = max(rounding, float(off[q.float() >= 2**-6].max()))
    with torch.device("meta"):
        body = preset("deepseek-v3").dump() | {"stack": {"kind": "multi_token"}}
        published: Any = validate(TransformerSpec, body).build()
    module = sum(p.numel() for p in published.decoder.predictors.parameters())
    return Measured(
        {
            "losses and gradients that differ from the plain model's without modules": plain_differs,
            "predictions that read one token too many or too few": too_much,
            "tokens that drafts change": changed,
            "change of gates by a bias that changes no choice": gates,
            "largest relative rounding in 8 bits": rounding,
            "parameters of the published module, without embedding and head": module,
        }
    )


_identities.builds = (  # type: ignore[attr-defined]
    "torchstone.model.stack.multi_token",
    "torchstone.objectives.multi_token",
    "torchstone.generate.speculative",
    "torchstone.generate.engine",
    "torchstone.model.feedforward.router.sigmoid_bias",
    "torchstone.ops.fp8.reference",
)

IDENTITIES = Claim(
    id="exact",
    kind="identity",
    text="Without modules the objective is the plain one to the bit; module k at position i reads tokens up to i + k "
    "and no other; drafts change no token, greedy or sampled; the bias on choices enters no gate; a number in 8 bits "
    "with its tile's scale is within 2^-4; the published model's module has 11.6 billion parameters of its own.",
    figure="eqs. 12 to 16 and 21 to 25; E4M3 with a scale for each 1 x 128 tile; README: 11.5B unique parameters",
    gates=(
        Number("losses and gradients that differ from the plain model's without modules", high=0),
        Number("predictions that read one token too many or too few", high=0),
        Number("tokens that drafts change", high=0),
        Number("change of gates by a bias that changes no choice", high=0),
        Number("largest relative rounding in 8 bits", high=2**-4 * (1 + 1e-6)),
        # a layer of 11.507e9 (latent attention, 257 experts, a router, norms), M_1 of 2 * 7168^2, two norms
        Number("parameters of the published module, without embedding and head", low=11.55e9, high=11.65e9),
    ),
    run=_identities,
    withdrawn="it took rounding for reading: who else is routed to an expert may move the last bit of its product; see "
    "exact-to-rounding",
)


def _to_rounding(scale: Scale, first: int) -> Measured:
    """As `_identities`; what a prediction reads is what changes it by more than 1e-5, where it is of size one."""
    numbers, wrong = dict(_identities(scale, first).numbers), 0
    for seed in range(first, first + (1 if scale == "quick" else 5)):
        model, ids = _model(2, seed), _batch(seed)["ids"]
        before = _predicted(model, ids)
        for at in range(ids.shape[1]):
            other = ids.clone()
            other[:, at] = (other[:, at] + 1) % 61
            for k, (a, b) in enumerate(zip(before, _predicted(model, other), strict=True), 1):
                reads = (a - b).abs().amax(-1) > 1e-5
                wrong += int(reads[:, : max(0, at - k)].sum())
                wrong += int((~reads[:, at - k]).sum()) if at >= k else 0
    return Measured({**numbers, "predictions that read one token too many or too few": wrong})


_to_rounding.builds = _identities.builds  # type: ignore[attr-defined]

IDENTITIES_TO_ROUNDING = replace(
    IDENTITIES,
    id="exact-to-rounding",
    text=f"{IDENTITIES.text} To read a token is to change with it by more than rounding.",
    run=_to_rounding,
    withdrawn=None,
)


# --------------------------------------------------------------------------------------------- trainings of functions


@dataclass(frozen=True)
class _Size:
    seeds: int
    control_seeds: int
    steps: int
    model: Mapping[str, Any]
    block: int = 64
    batch: int = 16


_DENSE: dict[str, Any] = {"width": 64, "depth": 3, "attention": {"heads": 4}, "ffn": {"kind": "mlp", "hidden": 192}}
_EXPERTS: dict[str, Any] = {**_DENSE, "ffn": {"kind": "moe", "experts": 16, "active": 2, "hidden": 96}}
_SHIFT = 100_000
"""Distance of null arms' seeds from the others'."""


def _trained(size: _Size, folder: str, seed: int, **sections: Any) -> RunFolder:
    recipe = {
        "data": {"corpus": "packages", "tokenizer": "bytes", "block": size.block},
        "optimizer": {"kind": "adamw", "lr": 3e-3},
        "schedule": {"kind": "cosine", "warmup": 20},
        **one_thread(size.steps, size.batch, blocks=16, test_blocks=256),
        **{name: section for name, section in sections.items() if name != "trainer"},
    }
    recipe["trainer"] |= {"seed": seed, "log_every": 1}
    return train(load_recipe(recipe), out=Path(folder) / "run", quiet=True)


# ------------------------------------------------------------------------------------------ (a) balance without a loss


class BackwardsSpec(SigmoidBiasSpec):
    """A bias that moves the wrong way: for the claim's sabotage arm."""

    kind: ClassVar[str] = "sigmoid_bias_backwards"
    offered: ClassVar[bool] = False

    def build(self, site: Site, experts: int, active: int) -> Router:
        return _Backwards(self, site, experts, active)


class _Backwards(SigmoidBiasRouter):
    @torch.no_grad()
    def after_step(self, step: int, sums: Mapping[str, torch.Tensor]) -> None:
        load_E = sums[self.name]
        self.bias -= self.spec.update_rate * torch.sign(load_E.mean() - load_E).to(self.bias)


_BALANCE = {
    "quick": _Size(seeds=1, control_seeds=1, steps=40, model=_EXPERTS),
    "evidence": _Size(seeds=5, control_seeds=3, steps=250, model=_EXPERTS),
}
_WEIGHTS = (0.01, 0.03, 0.1)
"""Of the balance loss, the baseline."""
_LAST = 30
"""Steps at the end over which loads are averaged."""


def _balanced(size: _Size, seed: int, **router: Any) -> tuple[float, float]:
    """Test loss, and MaxVio: the fullest expert's load over the mean, less 1."""
    fields = {"kind": "sigmoid_bias", "sequence_balance": 0.0, "update_rate": 0.0, **router}
    with tempfile.TemporaryDirectory(prefix="torchstone-balance-") as folder:
        model = {**size.model, "ffn": {**size.model["ffn"], "router": fields}}
        rows = _trained(size, folder, seed, model=model).metrics()
    loads = [row["load_max"] for row in rows if "load_max" in row][-_LAST:]
    loss = next(row["test_loss"] for row in reversed(rows) if "test_loss" in row)
    return loss, sum(loads) / len(loads) - 1.0


def _balance(scale: Scale, first: int) -> Measured:
    size = _BALANCE[scale]
    seeds, few = range(first, first + size.seeds), range(first, first + size.control_seeds)
    bias = {"update_rate": 0.01}  # the paper's 0.001 for millions of steps moves nothing in hundreds
    found = {"bias": {seed: _balanced(size, seed, **bias) for seed in seeds}}
    found["none"] = {seed: _balanced(size, seed) for seed in seeds}
    for weight in _WEIGHTS:
        found[f"loss of {weight}"] = {seed: _balanced(size, seed, balance=weight) for seed in seeds}
    found["none again"] = {seed: _balanced(size, seed) for seed in (s + _SHIFT for s in few)}
    found["backwards"] = {seed: _balanced(size, seed, kind="sigmoid_bias_backwards", **bias) for seed in few}
    means = {arm: sum(pair[1] for pair in of.values()) / len(of) for arm, of in found.items()}
    near = min((f"loss of {weight}" for weight in _WEIGHTS), key=lambda arm: abs(means[arm] - means["bias"]))
    values = {arm: {seed: pair[0] for seed, pair in of.items()} for arm, of in found.items()}
    values["balance loss"] = values[near]
    for arm in ("bias", "none again", "backwards"):
        values[f"{arm}: MaxVio"] = {seed: pair[1] for seed, pair in found[arm].items()}
    values["0.3 of none's MaxVio"] = {seed: 0.3 * pair[1] for seed, pair in found["none"].items()}
    return Measured({f"MaxVio of {arm}": mean for arm, mean in means.items()}, values)


_balance.builds = (  # type: ignore[attr-defined]
    "torchstone.model.feedforward.router.sigmoid_bias",
    "torchstone.model.feedforward.router._scored",
    "torchstone.model.feedforward.moe",
)

BALANCE = Claim(
    id="balance-without-a-loss",
    kind="behaviour",
    text="16 experts of which 2 are taken, in a byte model of 3 layers: a bias on choices that moves by 0.01 a step "
    "leaves at most 0.3 of the violation of balance that there is without it after 250 steps, and the test loss is not "
    "worse by 0.002 nats than with that of three weights of a balance loss that balances most nearly as well.",
    figure="1B parameters, 100B tokens: MaxVio 0.04 and perplexity 9.50 with the bias, 0.72 and 9.56 with the loss",
    gates=(
        Effect("balanced", "bias: MaxVio", "0.3 of none's MaxVio", 0.0, "backwards: MaxVio", null="none again: MaxVio"),
        Effect("no worse than with the loss", "bias", "balance loss", margin=-0.002, sabotage="backwards"),
    ),
    run=_balance,
)


# ------------------------------------------------------------------------------------------- (b) multi-token prediction


class OffByOneSpec(MultiTokenSpec):
    """A module that is trained on the embedding of its own token and drafts with the next: for the sabotage arm."""

    kind: ClassVar[str] = "multi_token_off_by_one"
    offered: ClassVar[bool] = False

    def build(self, facts: Facts) -> Objective:
        return _OffByOne(self)


class _OffByOne(MultiToken):
    def forward(self, model: Any, batch: Batch, key: Key | None) -> Result:
        drop = None if key is None else key.tensor(batch["ids"].device)
        out, length = model(tokens_of(batch), outputs="none", key=drop), batch["ids"].shape[1]
        hidden, aux = predict(model, 1, out.hidden[:, :-1], tokens_of(batch).slice(0, length - 1), key=drop)
        terms = {
            "loss": Term(vocabulary_loss(model, out.hidden, batch["next"])),
            "mtp_1": Term(vocabulary_loss(model, hidden, further_targets(batch, 1)), weight=self.weight),
        }
        return Result.of(terms, add_aux(out.aux, aux))


_AHEAD = {
    "quick": _Size(seeds=1, control_seeds=1, steps=60, model=_DENSE),
    "evidence": _Size(seeds=5, control_seeds=3, steps=600, model=_DENSE),
}
_PROMPTS, _PROMPT, _NEW = 16, 32, 96


def _drafted(size: _Size, seed: int, objective: Any, predictors: int = 1) -> tuple[float, float, int]:
    """Test loss of the main model, tokens a pass along its own greedy text, and how many of them drafts change."""
    with tempfile.TemporaryDirectory(prefix="torchstone-mtp-") as folder:
        model = {**size.model, "stack": {"kind": "multi_token", "predictors": predictors}}
        run = _trained(size, folder, seed, model=model, objective=objective)
        loss = next(row["test_loss"] for row in reversed(run.metrics()) if "test_loss" in row)
        if not predictors:
            return loss, 1.0, 0
        made: Any = run.model()
        texts, tokenizer = run.recipe.data.prepare().texts("test"), run.tokenizer()
    prompts = [text.text[:_PROMPT] for text in texts if len(text.text) > _PROMPT][:_PROMPTS]
    greedy = Sampling(temperature=0, max_new_tokens=_NEW)
    ours, theirs = (
        Engine(made, tokenizer, draft=draft, compile="off", eos=()).generate(prompts, greedy) for draft in ("mtp", None)
    )
    changed = sum(x != y for a, b in zip(ours, theirs, strict=True) for x, y in zip(a.ids, b.ids, strict=True))
    accepted, drafted = (sum(getattr(each, name) for each in ours) for name in ("accepted", "drafted"))
    return loss, 1.0 + accepted / drafted, changed


def _ahead(scale: Scale, first: int) -> Measured:
    size = _AHEAD[scale]
    seeds, few = range(first, first + size.seeds), range(first, first + size.control_seeds)
    arms: dict[str, tuple[Any, Any]] = {
        "one module": ({"kind": "multi_token"}, seeds),
        "untrained module": ({"kind": "causal_lm"}, few),
        "off by one": ({"kind": "multi_token_off_by_one"}, few),
        "the further token alone": ({"kind": "multi_token", "weight": 30.0}, few),
    }
    found = {arm: {seed: _drafted(size, seed, what) for seed in of} for arm, (what, of) in arms.items()}
    values = {arm: {seed: made[0] for seed, made in of.items()} for arm, of in found.items()}
    values["plain"] = {seed: _drafted(size, seed, {"kind": "causal_lm"}, 0)[0] for seed in seeds}
    values |= {f"{arm}: tokens a pass": {seed: made[1] for seed, made in of.items()} for arm, of in found.items()}
    values["1.6 tokens a pass"] = dict.fromkeys(seeds, 1.6)
    changed = sum(made[2] for of in found.values() for made in of.values())
    return Measured({"tokens that drafts change": changed}, values)


_ahead.builds = (  # type: ignore[attr-defined]
    "torchstone.model.stack.multi_token",
    "torchstone.objectives.multi_token",
    "torchstone.generate.speculative",
    "torchstone.generate.engine",
)

AHEAD = Claim(
    id="one-token-further",
    kind="behaviour",
    text="A byte model of 3 layers trained for 600 steps with one module at a weight of 0.3 is not worse by 0.02 nats "
    "a byte than without it, and writes more than 1.6 tokens a pass of its own greedy text with the module's drafts.",
    figure="second token accepted 85 to 90 % of the time, 1.8 times the tokens a second; most benchmarks better",
    gates=(
        Number("tokens that drafts change", high=0),
        Effect("main loss no worse", "one module", "plain", margin=-0.02, sabotage="the further token alone"),
        Effect(
            "tokens a pass",
            "one module: tokens a pass",
            "1.6 tokens a pass",
            margin=0.0,
            null="untrained module: tokens a pass",
            sabotage="off by one: tokens a pass",
            lower_is_better=False,
        ),
    ),
    run=_ahead,
)


# ----------------------------------------------------------------------------------------------- (c) training in 8 bits


class UnscaledSpec(FP8BlockSpec):
    """Gradients in 8 bits without a scale, which lets most of them vanish: for the claim's sabotage arm."""

    kind: ClassVar[str] = "fp8_unscaled"
    offered: ClassVar[bool] = False

    def build(self, d_in: int, outs: tuple[int, ...], roles: tuple[str, ...], bias: Bias, init: Initialise) -> Linear:
        return _Unscaled(d_in, outs, roles, bias, self, init)


class _Unscaled(FP8Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(lambda g: g.to(torch.float8_e4m3fn).to(g.dtype))
        return y


@torch.no_grad()
def _errors(seed: int) -> dict[str, float]:
    """Relative errors of products of normal numbers, in the Frobenius norm."""
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(n, 512, generator=generator, dtype=torch.float64) for n in (256, 384))

    def error(x: torch.Tensor, tile: int, rows: int, of: torch.Tensor) -> float:
        a = dequantise(*quantise(x, tile, rows), tile, rows)[:, of]
        b = dequantise(*quantise(w, 128, 128), 128, 128)[:, of]
        exact = x[:, of] @ w[:, of].T
        return float((a @ b.T - exact).norm() / exact.norm())

    every, rest = torch.ones(512, dtype=torch.bool), torch.arange(512) != 7
    found = {"error of a product": error(x, 128, 1, every)}
    for name, times in (("10^3", 1e3), ("2^20", 2.0**20)):
        large = x.clone()
        large[:, 7] *= times
        found[f"error beside a channel {name} times as large, one scale for all"] = error(large, 512, 256, rest)
        found[f"error beside a channel {name} times as large, tiles"] = error(large, 128, 1, rest)
    return found


def _products(scale: Scale, first: int) -> Measured:
    each = [_errors(seed) for seed in range(first, first + 5)]
    return Measured({name: sum(one[name] for one in each) / len(each) for name in each[0]})


_products.builds = ("torchstone.ops.fp8.reference", "torchstone.model.linear.fp8_block")  # type: ignore[attr-defined]

EIGHT_BITS = Claim(
    id="eight-bits",
    kind="behaviour",
    text="After 300 steps, each at the best of three learning rates, a small byte model whose projections take all "
    "three products in emulated 8 bits is not worse by 0.01 nats a byte (0.5 %) than one in 32-bit floats. A product "
    "of normal numbers is off by less than 5 %; a channel 2^20 times as large as the rest takes all of the rest with "
    "one scale, and with tiles only what shares its own.",
    figure="relative difference of losses to BF16 below 0.25 %; a scale for each 1 x 128 tile and 128 x 128 block "
    "against outliers",
    gates=(
        Effect("beside 32 bits", "fp8", "dense", margin=-0.01, sabotage="unscaled"),
        Number("error of a product", low=0.02, high=0.05),
        Number("error beside a channel 2^20 times as large, one scale for all", low=0.95),
        Number("error beside a channel 2^20 times as large, tiles", high=0.55),
    ),
    run=_products,
    arms=Arms(
        recipe={
            "model": {**_DENSE, "width": 128, "ffn": {"kind": "mlp", "hidden": 256}},
            "data": {"corpus": "packages", "tokenizer": "bytes", "block": 64},
            "optimizer": {"kind": "adamw", "lr": 3e-3, "weight_decay": 0.0},
            "schedule": {"kind": "cosine", "warmup": 20},
            **one_thread(300, 8, blocks=64, test_blocks=512),
        },
        patches={
            "dense": {},
            "fp8": {"model": {"linear": "fp8_block"}},
            "unscaled": {"model": {"linear": "fp8_unscaled"}},
        },
        settings={
            "quick": Setting(seeds=1, control_seeds=1, patch={"model": {"depth": 1}, "trainer": {"steps": 20}}),
            "evidence": Setting(seeds=5, control_seeds=3, tune=("optimizer.lr", (1e-3, 3e-3, 1e-2))),
            "gpu": Setting(
                seeds=3,
                control_seeds=3,
                patch={
                    "model": {"width": 1024, "depth": 12, "attention": {"heads": 16}, "ffn": {"hidden": 4096}},
                    "data": {"block": 512},
                    "schedule": {"warmup": 375},
                    "trainer": {"steps": 20_000, "batch": 64, "precision": "bf16"},
                },
            ),
        },
        metric="test_loss",
        imports=("torchstone.papers.deepseek_v3",),
    ),
)

PAPER = Paper(
    slug="deepseek-v3",
    title="DeepSeek-V3 Technical Report",
    authors="DeepSeek-AI",
    year=2024,
    link="https://arxiv.org/abs/2412.19437",
    topics=("experts", "multi-token prediction", "speculative decoding", "quantisation", "decoding"),
    parts=("router.sigmoid_bias", "stack.multi_token", "objective.multi_token", "linear.fp8_block"),
    summary="Experts balanced by a bias on choices in the place of a loss, a module that predicts one token further "
    "and drafts it in decoding, and training whose products are of 8-bit floats with a scale for each small block.",
    claims=(IDENTITIES, IDENTITIES_TO_ROUNDING, BALANCE, AHEAD, EIGHT_BITS),
)
