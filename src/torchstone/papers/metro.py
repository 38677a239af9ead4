"""METRO: Efficient Denoising Pretraining with Model Generated Signals (Bajaj et al. 2022, arXiv 2204.06644)."""

from __future__ import annotations

import ast
import builtins
import functools
import io
import keyword
import math
import tokenize
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from torchstone.data.text import TextDataSpec
from torchstone.keys import Key
from torchstone.model.site import initialise
from torchstone.model.taps import Taps
from torchstone.model.transformer import TransformerSpec
from torchstone.objectives import Facts
from torchstone.objectives.replaced_token import ReplacedTokenSpec
from torchstone.papers._claim import Claim, Effect, Measured, Number, Paper, Scale, one_thread
from torchstone.recipe import Recipe, load_recipe
from torchstone.spec import validate
from torchstone.train.training import make_trainer

__all__ = ["PAPER"]

_VOCABULARY, _ROWS, _LENGTH = 1000, 16, 64


def _pair(seed: int, std: float, dropout: float = 0.0, **fields: Any) -> tuple[Any, Any]:
    """A model and its objective."""
    spec = validate(
        TransformerSpec,
        {
            "width": 64,
            "depth": 4,
            "vocabulary": _VOCABULARY,
            "context": _LENGTH,
            "causal": False,
            "attention": {"heads": 4},
            "position": {"kind": "t5_learned", "buckets": 32, "far": 128},
            "residual": {"kind": "post_scaled", "std": std},
            "dropout": dropout,
            "norm": "layernorm",
            "head": {"kind": "token_classification", "classes": 1},
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        objective = validate(ReplacedTokenSpec, fields).build(Facts(_VOCABULARY, 0, 1, 2, model=spec))
    return initialise(spec.build(), seed), objective


def _exact(scale: Scale, first: int) -> Measured:
    numbers: dict[str, float] = {}

    def worst(name: str, value: float) -> None:
        numbers[name] = max(numbers.get(name, 0.0), value)

    for seed in range(first, first + 3):
        ids = torch.randint(3, _VOCABULARY, (_ROWS, _LENGTH), generator=Key(seed).generator())
        model, objective = _pair(seed, 0.02)
        batch = objective.prepare({"ids": ids}, Key(seed))
        found, counts = objective(model, batch, None), objective.counts(batch)
        at_first = sum(float(term.weight * term.total / counts[term.over]) for term in found.terms.values())
        guessing = 2 * math.log(_VOCABULARY) + 50 * math.log(2)
        worst("loss at first over that of guessing, off by", abs(at_first / guessing - 1))
        both = found.terms["detection"].total + found.terms["correction"].total
        own = list(objective.generator.parameters())
        grads = torch.autograd.grad(both, own, retain_graph=True, allow_unused=True)
        worst("gradient of detection and correction in the generator", float(sum(g is not None for g in grads)))
        grads = torch.autograd.grad(found.terms["generator"].total, own, allow_unused=True)
        worst("generator's parameters without a gradient of its loss", float(sum(g is None for g in grads)))
        shared = {name for name, _ in objective.generator.named_parameters() if name.startswith("embedding")}
        worst("embeddings of the generator's own", float(len(shared)))
        drawn = {}
        for sampling in ("zero_dropout", "train", "eval"):
            for dropout in (0.0, 0.3):
                again, other = _pair(seed, 0.3, dropout, sampling=sampling)
                drawn[sampling, dropout] = other._corrupted(again, batch, Key(seed))[1]
        same = (drawn["train", 0.0] != drawn["zero_dropout", 0.0]) | (drawn["eval", 0.0] != drawn["zero_dropout", 0.0])
        worst("draws that differ between modes without dropout", float(same.sum()))
        worst("draws that dropout changes in a second pass", float((drawn["eval", 0.3] != drawn["eval", 0.0]).sum()))
        share = float((drawn["train", 0.3] != drawn["train", 0.0]).float().mean())
        name = "share of draws that dropout changes in the noisy pass, least"
        numbers[name] = min(numbers.get(name, math.inf), share)
        oracle = _pair(seed, 0.02, corruption="oracle")
        worst("tokens replaced by the oracle", float(oracle[1](oracle[0], batch, None).metrics["replaced"][0]))
        chance = _pair(seed, 0.02, corruption="uniform")
        replaced, masked = (float(part) for part in chance[1](chance[0], batch, None).metrics["replaced"])
        name = "tokens replaced at random over tokens masked, least"
        numbers[name] = min(numbers.get(name, math.inf), replaced / masked)
    return Measured(numbers)


_exact.builds = ("torchstone.objectives.replaced_token",)  # type: ignore[attr-defined]

EXACT = Claim(
    id="exact",
    kind="identity",
    text="The model's losses give the generator no gradient, and the generator's gives it all; the embedding is one. "
    "At first the loss is that of guessing. Without dropout the three ways to draw are one; with it a second pass "
    "draws as without, and the noisy pass otherwise. A drawn token that is the original counts as one.",
    figure="L = L_A + 50 L_RTD + L_SCLM; zero-dropout draws in one pass",
    gates=(
        Number("loss at first over that of guessing, off by", high=0.03),
        Number("gradient of detection and correction in the generator", low=0, high=0),
        Number("generator's parameters without a gradient of its loss", low=0, high=0),
        Number("embeddings of the generator's own", low=0, high=0),
        Number("draws that differ between modes without dropout", low=0, high=0),
        Number("draws that dropout changes in a second pass", low=0, high=0),
        Number("share of draws that dropout changes in the noisy pass, least", low=0.05),
        Number("tokens replaced by the oracle", low=0, high=0),
        Number("tokens replaced at random over tokens masked, least", low=0.9),
    ),
    run=_exact,
)

# ------------------------------------------------------------------------------------------ categories of Python tokens

_CATEGORIES = ("keyword", "builtin", "attribute", "parameter", "local", "operator", "string", "number")


def _scopes(tree: ast.AST) -> list[tuple[int, int, set[str], set[str]]]:
    """First and last line, parameters and assigned names of each function, inner ones after those around them."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parameters = {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}
            stored = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            found.append((node.lineno, node.end_lineno or node.lineno, parameters, stored - parameters))
    return sorted(found, key=lambda scope: (scope[0], -scope[1]))


def _categories(text: str) -> np.ndarray:
    """Of each character of a source, the number of its token's category; -1 for others (modules' names, comments).

    Raises:
        SyntaxError, tokenize.TokenError: it is no Python.
    """
    scopes, line_starts = _scopes(ast.parse(text)), np.cumsum([0, *map(len, text.splitlines(keepends=True))])
    found, before = np.full(len(text), -1), ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind, (line, column), name = token.type, token.start, token.string
        label = ""
        if kind == tokenize.OP:
            label = "operator"
        elif kind == tokenize.NUMBER:
            label = "number"
        elif tokenize.tok_name[kind] in ("STRING", "FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END"):
            label = "string"
        elif kind == tokenize.NAME:
            around = [scope for scope in scopes if scope[0] <= line <= scope[1]][-1:]
            if keyword.iskeyword(name):
                label = "keyword"
            elif before == ".":
                label = "attribute"
            elif around and name in around[0][2]:
                label = "parameter"
            elif around and name in around[0][3]:
                label = "local"
            elif hasattr(builtins, name):
                label = "builtin"
        if label:
            start, (last, end) = line_starts[line - 1] + column, token.end
            found[start : line_starts[last - 1] + end] = _CATEGORIES.index(label)
        if kind not in (tokenize.NL, tokenize.COMMENT):
            before = name
    return found


@functools.lru_cache(maxsize=4)
def _labelled(data: TextDataSpec, split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and categories (N, T) of the first rows of a split's ASCII sources; -1 where there is no category."""
    prepared: Any = data.prepare()
    rows: list[tuple[torch.Tensor, torch.Tensor]] = []
    for document in prepared.texts(split):
        if not document.text.isascii():
            continue
        try:
            label = _categories(document.text)
        except (SyntaxError, tokenize.TokenError):
            continue
        ids = prepared.tokenizer.encode(document.text)
        pieces = [prepared.tokenizer.decode([id]) for id in ids]
        ends = np.cumsum([len(piece) for piece in pieces])
        # the category of a piece is that of its last character: a blank may stand before a word
        of = [int(label[end - 1]) for end in ends]
        for at in range(0, len(ids) - data.block, data.block):
            rows.append((torch.tensor(ids[at : at + data.block]), torch.tensor(of[at : at + data.block])))
        if len(rows) >= count:
            break
    ids_NT, label_NT = (torch.stack(part) for part in zip(*rows[:count], strict=True))
    return ids_NT, label_NT


@torch.no_grad()
def _probe(model: Any, data: TextDataSpec, rows: int) -> tuple[float, float]:
    """Macro-F1 of categories by a linear probe on the layer that is best on a third of the rows it may learn from: on
    that third, and on test rows."""
    (learn, other), (asked, wanted) = (_labelled(data, split, rows) for split in ("valid", "test"))
    names = [f"encoder.layers.{layer}.x" for layer in range(model.spec.depth)]

    def features(ids_NT: torch.Tensor) -> list[torch.Tensor]:
        taps = Taps(names)
        model(ids_NT, taps=taps, outputs="none")
        return [taps.seen[name].double() for name in names]

    def scored(x: torch.Tensor, y: torch.Tensor, x_asked: torch.Tensor, y_asked: torch.Tensor) -> float:
        x, y, x_asked, y_asked = x[y >= 0], y[y >= 0], x_asked[y_asked >= 0], y_asked[y_asked >= 0]
        mean, std = x.mean(0), x.std(0)
        x, x_asked = ((F.pad((each - mean) / std, (0, 1), value=1.0)) for each in (x, x_asked))
        ridge = x.T @ x + 1e-3 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        told = (x_asked @ torch.linalg.solve(ridge, x.T @ F.one_hot(y, len(_CATEGORIES)).double())).argmax(-1)
        scores = []
        for each in y_asked.unique():
            right = ((told == each) & (y_asked == each)).sum()
            scores.append(float(2 * right / ((told == each).sum() + (y_asked == each).sum())))
        return float(np.mean(scores))

    model.eval()
    ours, theirs, cut = features(learn), features(asked), len(learn) * 2 // 3
    chosen = [scored(x[:cut], other[:cut], x[cut:], other[cut:]) for x in ours]
    best = int(np.argmax(chosen))
    return chosen[best], scored(ours[best], other, theirs[best], wanted)


@dataclass(frozen=True)
class _Size:
    """What a scale spends."""

    steps: int
    rows: int
    seeds: int
    controls: int
    rates: tuple[float, ...]


_SIZES = {"quick": _Size(20, 60, 1, 1, (3e-3,)), "evidence": _Size(200, 400, 5, 3, (3e-3, 1e-2))}
_AGAIN, _TUNING = 100_000, 500_000
_GENERATOR = {"kind": "replaced_token", "generator": {"depth": 1}}
_ARMS: dict[str, dict[str, Any]] = {
    "metro": _GENERATOR,
    "masked tokens judged": {**_GENERATOR, "detect": "masked"},
    "unigram": {"kind": "replaced_token", "corruption": "unigram"},
    "masked tokens judged, again": {**_GENERATOR, "detect": "masked"},
    "unigram, again": {"kind": "replaced_token", "corruption": "unigram"},
    "uniform": {"kind": "replaced_token", "corruption": "uniform"},
    "oracle": {"kind": "replaced_token", "corruption": "oracle"},
    "masked language model": {"kind": "masked_lm"},
}


def _recipe(size: _Size, arm: str, seed: int, lr: float) -> Recipe:
    head: Any = "mlm" if arm == "masked language model" else {"kind": "token_classification", "classes": 1}
    settings = one_thread(size.steps, 16, blocks=64)
    settings["trainer"] |= {"seed": seed, "device": "cpu", "log_every": 4}
    settings["evaluate"]["test"] = False
    return load_recipe(
        {
            "model": {
                "width": 64,
                "depth": 3,
                "causal": False,
                "attention": {"heads": 4, "bias": "all"},
                "position": "t5_learned",
                "ffn": {"kind": "mlp", "bias": True},
                "residual": "post_scaled",
                "norm": "layernorm",
                "embedding": {"norm": "layernorm"},
                "head": head,
            },
            "data": {"corpus": "stdlib", "tokenizer": "bytes", "block": 48},
            "objective": _ARMS[arm],
            "optimizer": {"lr": lr, "betas": [0.9, 0.98], "weight_decay": 0.01},
            "schedule": {"kind": "linear", "warmup": size.steps // 10},
            **settings,
        }
    )


def _trained(size: _Size, arm: str, seed: int, lr: float) -> dict[str, float]:
    trainer, made = make_trainer(_recipe(size, arm, seed, lr))
    rows = trainer.fit()
    replaced = [row["replaced"] for row in rows if "replaced" in row]
    valid, test = _probe(trainer.model, made.data, size.rows)  # type: ignore[arg-type]
    found = {"valid": valid, "macro-F1": test}
    if arm == "metro":
        # one batch has some hundred masked tokens: means of fifths of the training
        shares = torch.stack([part.mean() for part in torch.tensor(replaced, dtype=torch.float64).chunk(5)])
        ranks = torch.stack([torch.arange(len(shares)), shares.argsort().argsort()]).double()
        found["replaced falls"] = float(torch.corrcoef(ranks)[0, 1])
    return found


def _signals(scale: Scale, first: int) -> Measured:
    size = _SIZES[scale]
    numbers: dict[str, float] = {}
    values: dict[str, dict[int, float]] = {}
    for arm in _ARMS:
        like = arm.removesuffix(", again")
        if arm == like and len(size.rates) > 1:
            scores = {lr: _trained(size, arm, first + _TUNING, lr)["valid"] for lr in size.rates}
            numbers[f"{arm}: learning rate"] = max(scores, key=scores.__getitem__)
        rate = numbers.get(f"{like}: learning rate", size.rates[0])
        main, reported = arm in tuple(_ARMS)[:3], arm == "masked language model"
        for seed in range(first, first + (1 if reported else size.seeds if main else size.controls)):
            found = _trained(size, arm, seed + (_AGAIN if arm != like else 0), rate)
            values.setdefault(arm, {})[seed] = found["macro-F1"]
            if "replaced falls" in found:
                name = "rank correlation of the share replaced with the step, largest"
                numbers[name] = max(numbers.get(name, -1.0), found["replaced falls"])
    return Measured(numbers, values)


_signals.builds = (  # type: ignore[attr-defined]
    "torchstone.objectives.replaced_token",
    "torchstone.objectives.masked_lm",
    "torchstone.model.residual.post_scaled",
    "torchstone.model.position.t5_learned",
)

SIGNALS = Claim(
    id="model-generated-signals",
    kind="behaviour",
    text="A linear probe of bytes tells categories of Python tokens (macro-F1) better from an encoder that detected "
    "what a generator trained beside it put in than from one that judged masked tokens alone, and than from one whose "
    "tokens were drawn by counts; the generator's tokens are replaced less and less often, from fifth to fifth of the "
    "training. Same steps, each arm at the better of two learning rates.",
    figure="section 4: GLUE averages of a study of each choice",
    gates=(
        Effect(
            "better than judging masked tokens alone",
            "metro",
            "masked tokens judged",
            margin=0.01,
            null="masked tokens judged, again",
            sabotage="oracle",
            lower_is_better=False,
        ),
        Effect(
            "better than tokens drawn by counts",
            "metro",
            "unigram",
            margin=0.01,
            null="unigram, again",
            sabotage="uniform",
            lower_is_better=False,
        ),
        Number("rank correlation of the share replaced with the step, largest", high=-0.5),
    ),
    run=_signals,
    scales=("quick", "evidence"),
)

# ---------------------------------------------------------------------------------------------- three times the steps

_LONGER = {
    "quick": _Size(20, 60, 1, 1, (3e-3,)),
    "evidence": _Size(600, 2000, 5, 5, (3e-3, 1e-2)),
}


def _operations(arm: str) -> float:
    """FLOPs of forward and backward pass over a batch, of the generator and of all heads too."""
    trainer, _ = make_trainer(_recipe(_LONGER["quick"], arm, 0, 1e-3))
    batch = trainer.objective.prepare(trainer.source.train.batch(Key(0), 0, 16), Key(0))
    with FlopCounterMode(display=False) as counted:
        found = trainer.objective(trainer.model, batch, Key(0))
        torch.stack([term.total for term in found.terms.values()]).sum().backward()
    return float(counted.get_total_flops())


def _longer(scale: Scale, first: int) -> Measured:
    size = _LONGER[scale]
    numbers: dict[str, float] = {}
    values: dict[str, dict[int, float]] = {}
    tuned = tuple(_ARMS)[:3]
    for arm in _ARMS:
        like = arm.removesuffix(", again")
        if arm in tuned and len(size.rates) > 1:
            scores = {lr: _trained(size, arm, first + _TUNING, lr)["valid"] for lr in size.rates}
            numbers[f"{arm}: learning rate"] = max(scores, key=scores.__getitem__)
        rate = numbers.get(f"{like if like in tuned else 'metro'}: learning rate", size.rates[0])
        reported = arm == "masked language model"
        for seed in range(first, first + (1 if reported else size.seeds if arm in tuned else size.controls)):
            found = _trained(size, arm, seed + (_AGAIN if arm != like else 0), rate)
            values.setdefault(arm, {})[seed] = found["macro-F1"]
            if "replaced falls" in found:
                name = "rank correlation of the share replaced with the step, largest"
                numbers[name] = max(numbers.get(name, -1.0), found["replaced falls"])
    for arm in ("metro", "unigram", "masked language model"):
        numbers[f"{arm}: GFLOPs a step"] = _operations(arm) / 1e9
    return Measured(numbers, values)


_longer.builds = _signals.builds  # type: ignore[attr-defined]

LONGER = Claim(
    id="signals-over-600-steps",
    kind="behaviour",
    text="As model-generated-signals, over three times the steps and told by five times the probe's rows: macro-F1 of "
    "categories of Python tokens is higher by a point than from judging masked tokens alone, and than from tokens "
    "drawn by counts; the share of the generator's tokens that are replaced falls from fifth to fifth. What a step "
    "computes stands beside, and a masked language model.",
    figure="section 4: GLUE averages of a study of each choice",
    gates=SIGNALS.gates,
    run=_longer,
    scales=("quick", "evidence"),
)

PAPER = Paper(
    slug="metro",
    title="METRO: Efficient Denoising Pretraining of Large Scale Autoencoding Language Models with Model Generated "
    "Signals",
    authors="Payal Bajaj, Chenyan Xiong, Guolin Ke, Xiaodong Liu, Di He, Saurabh Tiwary, Tie-Yan Liu, Paul Bennett, "
    "Xia Song, Jianfeng Gao",
    year=2022,
    link="https://arxiv.org/abs/2204.06644",
    topics=("pre-training", "replaced-token detection"),
    parts=("objective.replaced_token",),
    summary="A shallow generator, trained beside, puts tokens into a text; the model tells which, and names the "
    "originals.",
    claims=(EXACT, SIGNALS, LONGER),
)
