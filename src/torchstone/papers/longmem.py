"""Augmenting Language Models with Long-Term Memory (Wang et al. 2023, arXiv 2306.07174)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from torchstone.adapt.longmem import LongMemAdaptSpec
from torchstone.model.bank import Bank
from torchstone.model.site import initialise
from torchstone.model.transformer import TransformerSpec
from torchstone.papers._claim import Claim, Effect, Measured, Number, Paper, Scale
from torchstone.recipe import load_recipe
from torchstone.spec import validate
from torchstone.train import train
from torchstone.train.engine import Split, Trainer
from torchstone.train.run import RunFolder
from torchstone.train.training import make_trainer

__all__ = ["PAPER"]

_VOCABULARY, _SEGMENT = 50, 24


def _models(position: str, seed: int) -> tuple[Any, Any]:
    """A backbone and its adaptation, whose side network starts as a copy of every second layer."""
    fields = {
        "width": 64,
        "depth": 4,
        "vocabulary": _VOCABULARY,
        "context": 64,
        "attention": {"heads": 4, "kv_heads": 2},
        "position": position,
        "residual": {"kind": "pre", "std": 0.3},
    }
    backbone = initialise(validate(TransformerSpec, fields).build(), seed)
    adapt = LongMemAdaptSpec.model_validate({"memory": {"tokens": 64, "retrieve": 16}})
    model = initialise(adapt.apply(backbone.spec).build(), seed)  # type: ignore[arg-type]
    given = {name: value.detach() for name, value in (*model.named_parameters(), *backbone.named_parameters())}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(given.get(adapt.starts_from(name) or name, parameter))
    adapt.prepare(model)
    return backbone, model


def _identities(scale: Scale, first: int) -> Measured:
    """Largest (or least) differences over positions and seeds."""
    numbers: dict[str, float] = {}

    def worst(name: str, found: torch.Tensor, wanted: torch.Tensor, choose: Callable[..., float] = max) -> None:
        difference = float((found - wanted).detach().abs().max())
        numbers[name] = choose(numbers.get(name, difference), difference)

    for position in ("rotary", "alibi", "none"):
        for seed in range(first, first + 3):
            backbone, model = _models(position, seed)
            drawn = torch.Generator().manual_seed(seed)
            segments = torch.randint(_VOCABULARY, (5, 2, _SEGMENT), generator=drawn)
            gate_H = model.decoder.side[1].attention.gate_H

            def filled(model: Any = model, segments: torch.Tensor = segments) -> Bank:
                bank = model.decoder.carry(2)
                with torch.no_grad():
                    for segment in segments[:4]:
                        model(segment, bank=bank, outputs="none")
                        bank.commit()
                return bank

            bank, ids_BT = filled(), segments[4]
            with torch.no_grad():
                half = model(ids_BT, bank=bank).logits
                without = model(ids_BT).logits
                gate_H.fill_(-100.0)
                worst("a closed gate, from no memory", model(ids_BT, bank=bank).logits, without)
                gate_H.zero_()
                worst("an open gate, from no memory", half, without, min)
            before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
            loss = F.cross_entropy(model(ids_BT[:, :-1], bank=bank).logits.flatten(0, 1), ids_BT[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            for name, parameter in model.named_parameters():
                if name.startswith("decoder.side."):
                    worst("a step of training: side network", parameter, before[name], max)
                elif not name.startswith("decoder.norm."):
                    worst("a step of training: backbone", parameter, before[name])
            worst("what is remembered after that step", filled().k_RGNCK, bank.k_RGNCK)
            numbers["tokens held after 96"] = 4.0 * bank.size(0)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(before[name])
                    if ".side." in name and name.endswith(("out.weight", "down.weight")):
                        parameter.zero_()
                worst("a side network of zeros, from the backbone", model(ids_BT).logits, backbone(ids_BT).logits)
    return Measured(numbers)


_BUILDS = ("torchstone.adapt.longmem", "torchstone.model.stack.longmem", "torchstone.model.bank")
_identities.builds = _BUILDS  # type: ignore[attr-defined]

IDENTITIES = Claim(
    id="frozen-backbone",
    kind="identity",
    text="A side network whose layers add nothing leaves the backbone's logits; a closed gate leaves those of a side "
    "network without memory; training moves the side network alone, so that what is remembered does not age; the "
    "memory keeps to its bound.",
    figure="side-network residuals, equation 2; gated joint attention, equation 5",
    gates=(
        Number("a side network of zeros, from the backbone", high=1e-4),
        Number("a closed gate, from no memory", high=1e-4),
        Number("an open gate, from no memory", low=1e-2),
        Number("a step of training: backbone", high=0.0),
        Number("a step of training: side network", low=1e-6),
        Number("what is remembered after that step", high=0.0),
        Number("tokens held after 96", low=64, high=64),
    ),
    run=_identities,
)


def _sizes(scale: Scale, first: int) -> Measured:
    """What the release's sizes come to, counted on shapes without memory."""
    fields = {
        "width": 1024,
        "depth": 24,
        "vocabulary": 50257,
        "context": 1024,
        "attention": {"heads": 16, "bias": "none"},
        "position": "alibi",
        "ffn": {"kind": "mlp", "hidden": 4096},
        "norm": {"kind": "layernorm"},
    }
    spec = LongMemAdaptSpec.model_validate({"memory": {"layer": 18}}).apply(validate(TransformerSpec, fields))
    with torch.device("meta"):
        model: Any = spec.build()
        bank = model.decoder.carry(1, torch.float16, "meta")
    matrices = sum(p.numel() for p in model.decoder.side.parameters() if p.dim() == 2)
    held = bank.k_RGNCK.numel() * bank.k_RGNCK.element_size() + bank.v_RGNCK.numel() * bank.v_RGNCK.element_size()
    return Measured(
        {
            "side network: matrices": float(matrices),
            "bank: bytes of keys and values in float16": float(held),
            "bank: chunks a head": float(bank.capacity),
        }
    )


_sizes.builds = _BUILDS  # type: ignore[attr-defined]

SIZES = Claim(
    id="side-network-and-bank",
    kind="arithmetic",
    text="Beside a backbone of 24 layers and width 1,024 the side network has 151 million weights, and a memory of "
    "65,536 tokens takes 268 MB in half precision.",
    figure="a release of 558M parameters beside a backbone of 407M; 65k tokens of memory",
    gates=(
        Number("side network: matrices", low=12 * 12 * 1024**2, high=12 * 12 * 1024**2),
        Number("bank: bytes of keys and values in float16", low=65536 * 2 * 1024 * 2, high=65536 * 2 * 1024 * 2),
        Number("bank: chunks a head", low=16384, high=16384),
    ),
    run=_sizes,
)

# ------------------------------------------------------------------------------------------------------- behaviour


class ShuffledBank(Bank):
    """A bank whose rows look things up in the memory of the row beside them."""

    def attend(
        self, q_BHTK: torch.Tensor, chunks: int, *, scale: float, softcap: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y_BHTK, has_B = super().attend(q_BHTK.roll(1, 0), chunks, scale=scale, softcap=softcap)
        return y_BHTK.roll(-1, 0), has_B.roll(-1, 0)


@dataclass(frozen=True)
class _Size:
    """What a scale spends: a backbone trained on blocks of `near` tokens, adapted on segments of `block` tokens."""

    near: int
    block: int
    backbone_steps: int
    steps: int
    seeds: int
    control_seeds: int
    documents: int
    rates: tuple[float, ...] = (0.02,)
    """Learning rates of Muon that each adaptation chooses from, by its loss on other documents under another seed."""
    model: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "fp32"


_GRID = (0.01, 0.02, 0.04)
_SIZES = {
    "quick": _Size(near=64, block=128, backbone_steps=60, steps=32, seeds=2, control_seeds=1, documents=2),
    "evidence": _Size(
        near=64, block=128, backbone_steps=8000, steps=256, seeds=5, control_seeds=3, documents=16, rates=_GRID
    ),
    "gpu": _Size(
        near=64,
        block=128,
        backbone_steps=20_000,
        steps=4000,
        seeds=5,
        control_seeds=3,
        documents=128,
        rates=_GRID,
        model={"width": 512, "depth": 12, "attention": {"heads": 8}},
        precision="bf16",
    ),
}
_LENGTH, _SHIFT, _TUNING_SEED = 4096, 100_000, 500_000
"""Tokens of a document, the distance of the null arm's seeds from the others', the seed that rates are chosen by."""


def _recipe(size: _Size, seed: int, steps: int, batch: int, rate: float = 0.02) -> dict[str, Any]:
    return {
        "optimizer": {"kind": "muon", "lr": rate},
        "schedule": {"kind": "cosine", "warmup": 20},
        "trainer": {
            "seed": seed,
            "steps": steps,
            "batch": batch,
            "threads": 1,
            "precision": size.precision,
            "compile": "off",
            "save_every": steps,
        },
        "evaluate": {"every": steps, "blocks": 1, "test": False},
    }


def _backbone(size: _Size, seed: int) -> dict[str, Any]:
    """A byte model that reads facts stated and asked for within one block."""
    model = {"width": 64, "depth": 4, "attention": {"heads": 4}, **size.model, "position": "alibi"}
    data = {
        "kind": "facts",
        "corpus": "packages",
        "block": size.near,
        "segments": 1,
        "facts": 4,
        "asks": 2,
        "letters": 1,
        "alphabet": 16,
        "nearest": 5,
        "farthest": size.near - 13,
        "examples": 1,
    }
    return {"model": model, "data": data, **_recipe(size, seed, size.backbone_steps, 16)}


def _adapted(size: _Size, seed: int, run: Path, arm: str, rate: float) -> dict[str, Any]:
    """An arm: what is stated lies 512 to 3,000 tokens before what asks for it."""
    block = 2 * size.block if arm == "tuned" else size.block
    data = {
        "kind": "facts",
        "corpus": "packages",
        "block": block,
        "segments": _LENGTH // block,
        "facts": 16,
        "asks": 4,
        "letters": 1,
        "alphabet": 16,
        "nearest": 512,
        "farthest": 3000,
        "forget": "segment" if arm == "no memory" else "document",
        "examples": size.documents,
    }
    memory = {"tokens": 4096, "chunk": 4, "retrieve": 32, "layer": size.model.get("depth", 4)}
    adapt = {"kind": "longmem", "memory": memory}
    recipe = {"init_from": str(run), "data": data, **_recipe(size, seed, size.steps, 8 * size.block // block, rate)}
    return recipe if arm in ("frozen", "tuned") else {**recipe, "adapt": adapt}


def _trainer(recipe: Mapping[str, Any]) -> Trainer:
    return make_trainer(load_recipe(recipe, start=lambda run: RunFolder(run).start()))[0]


def _tuned(size: _Size, run: Path, arm: str) -> float:
    """The learning rate whose adaptation has the least loss on validation documents."""
    losses = {}
    for rate in size.rates:
        trainer = _trainer(_adapted(size, _TUNING_SEED, run, arm, rate))
        trainer.fit()
        assert trainer.source.valid is not None
        losses[rate] = trainer.measure_split(trainer.source.valid, "valid")["valid_loss"]
    return min(losses, key=lambda rate: losses[rate])


def _measured(size: _Size, seed: int, run: Path, arm: str, plain: Split, rate: float) -> tuple[float, float]:
    """Accuracy on facts, and bits a byte of plain files, of one arm."""
    trainer = _trainer(_adapted(size, seed, run, "memory" if arm in ("shuffled", "untrained") else arm, rate))
    model: Any = trainer.model
    if arm == "shuffled":

        def carry(rows: int) -> Bank:
            R, G, N, C, K = model.decoder.carry(rows).k_RGNCK.shape
            return ShuffledBank(R, G, K, tokens=N * C, chunk=C, device=trainer.device)

        model.carry = carry
    if arm not in ("frozen", "untrained"):
        trainer.fit()
    assert trainer.source.test is not None
    row = trainer.measure_split(trainer.source.test, "test")
    files = trainer.measure_split(plain, "plain", size.documents * _LENGTH // size.block)
    return row["test_accuracy"], files["plain_bits_per_byte"]


def _far(scale: Scale, first: int) -> Measured:
    size, values = _SIZES[scale], dict[str, dict[int, float]]()
    files = {"kind": "documents", "corpus": "packages", "tokenizer": "bytes", "block": size.block}
    plain = load_recipe({"data": files}).data.prepare().test
    with tempfile.TemporaryDirectory(prefix="torchstone-longmem-") as folder:
        # one backbone, as in the paper: to train one until it knows what a name's value is takes most of the time
        run = train(_backbone(size, first), out=Path(folder) / "run", quiet=True).path
        rates = {arm: size.rates[0] for arm in ("memory", "no memory", "tuned")}
        if len(size.rates) > 1:
            rates = {arm: _tuned(size, run, arm) for arm in rates}
        for seed in range(first, first + size.seeds):
            arms = {"memory": 0, "no memory": 0, "tuned": 0}
            if seed == first:
                arms |= {"frozen": 0}
            if seed < first + size.control_seeds:
                arms |= {"shuffled": 0, "untrained": 0, "no memory again": _SHIFT}
            for arm, shift in arms.items():
                like = arm.removesuffix(" again")
                # what is not compared takes the rate of its like
                accuracy, bits = _measured(size, seed + shift, run, like, plain, rates.get(like, rates["memory"]))
                values.setdefault(arm, {})[seed] = accuracy
                values.setdefault(f"{arm}: bits", {})[seed] = bits
    return Measured({f"{arm}: learning rate": rate for arm, rate in rates.items()}, values)


_far.builds = (  # type: ignore[attr-defined]
    *_BUILDS,
    "torchstone.model.attention._joint",
    "torchstone.model.carry",
    "torchstone.data.facts",
    "torchstone.data.documents",
)

FAR = Claim(
    id="facts-far-apart",
    kind="behaviour",
    text="A byte model that is adapted with a memory of 4,096 tokens names at least 20 of 100 values more that were "
    "stated 512 to 3,000 bytes before, in segments of 128, than one whose side network was trained equally without a "
    "memory, and spends at most 0.02 bits a byte more than that on plain files; each at its best of three learning "
    "rates. One backbone serves all seeds, which differ in the order of what it is adapted on. The frozen backbone, "
    "and the backbone tuned with segments of 256, are measured beside it and no part of the claim.",
    figure="a memory of 65k tokens behind a window of 1k; ChapterBreak suffix identification 40.5 %, above models that "
    "read longer inputs",
    gates=(
        Effect(
            "a memory knows what was stated far before",
            "memory",
            "no memory",
            margin=0.20,  # the smallest gain for which anybody would carry a memory along
            null="no memory again",
            sabotage="shuffled",
            lower_is_better=False,
        ),
        Effect(
            "a memory does no harm on plain files",
            "memory: bits",
            "no memory: bits",
            margin=-0.02,  # 1 % of some 2 bits a byte
            sabotage="untrained: bits",
        ),
    ),
    run=_far,
)

PAPER = Paper(
    slug="longmem",
    title="Augmenting Language Models with Long-Term Memory",
    authors="Weizhi Wang, Li Dong, Hao Cheng, Xiaodong Liu, Xifeng Yan, Jianfeng Gao, Furu Wei",
    year=2023,
    link="https://arxiv.org/abs/2306.07174",
    topics=("long context", "memory", "retrieval", "adaptation", "side network"),
    parts=("adapt.longmem", "stack.longmem"),
    summary="How a trained model gets a memory that does not age: it stays frozen and fills a bank with keys and "
    "values, and a small network beside it learns to look them up.",
    claims=(IDENTITIES, SIZES, FAR),
)
