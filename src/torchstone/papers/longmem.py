"""Augmenting Language Models with Long-Term Memory (Wang et al. 2023, arXiv 2306.07174)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from torchstone.adapt.longmem import LongMemAdaptSpec
from torchstone.model.bank import Bank
from torchstone.model.site import initialise
from torchstone.model.transformer import TransformerSpec
from torchstone.papers._claim import Claim, Measured, Number, Paper, Scale
from torchstone.spec import validate

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
    claims=(IDENTITIES, SIZES),
)
