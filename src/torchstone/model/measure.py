"""What a model costs: parameters, decode state, arithmetic, energy. Counted on any device, the meta device too.

FLOPs are multiply-adds times two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from torchstone.model.linear import Linear, LinearBank, LinearSpec
from torchstone.spec import resolve

__all__ = ["Energy", "Measures", "energy", "measure"]


@dataclass(frozen=True)
class Measures:
    """Counts of a model.

    Attributes:
        parameters: trainable ones, of the main model.
        active_parameters: those that one token meets, without the input embedding, with the head.
        active_with_embedding: the same with the input embedding; a tied matrix counts once.
        buffers: elements of persistent buffers.
        state_bytes_per_token: decode state that grows with every token, in the dtype asked.
        state_bytes_fixed: decode state of a row whatever its length (rings, recurrent sums).
        flops_per_token: forward and backward, averaged over a sequence of `context` tokens.
        decode_flops_per_token: forward of one token after `context` others.
        context: tokens of that sequence.
        weight_bytes: of all parameters and persistent buffers, parameters in the dtype asked.
        packed_weight_bytes: the same after `export --to packed`, which leaves most models as they are.
    """

    parameters: int
    active_parameters: int
    active_with_embedding: int
    buffers: int
    state_bytes_per_token: int
    state_bytes_fixed: int
    flops_per_token: float
    decode_flops_per_token: float
    context: int
    weight_bytes: int
    packed_weight_bytes: int


@dataclass(frozen=True)
class Energy:
    """Picojoules that the products of one token with weights take, multiplications and additions, by the process that a
    chip is made in."""

    multiply_7nm: float
    add_7nm: float
    multiply_45nm: float
    add_45nm: float


_PICOJOULES: dict[str, dict[str, tuple[float, float]]] = {
    "7nm": {"fp32": (1.31, 0.38), "fp16": (0.34, 0.16), "int8": (0.07, 0.007)},
    "45nm": {"fp32": (3.7, 0.9), "fp16": (1.1, 0.4), "int8": (0.2, 0.03)},
}
"""Of a multiplication and an addition, as Wang et al. 2023 (arXiv 2310.11453) take them from earlier measurements."""


def energy(model: nn.Module, dtype: torch.dtype = torch.float32) -> Energy:
    """Estimate one token's energy as Wang et al. 2023 (arXiv 2310.11453) do: products with weights alone,
    by their numbers of operations; memory, attention and norms are left out. Floats of 16 bits count as fp16."""
    floats = "fp32" if dtype.itemsize >= 4 else "fp16"
    multiplied = added = whole = 0.0
    for d_in, d_out, times, spec in _products(model):
        each = spec.energy(d_in, d_out)
        multiplied, added, whole = (sum_ + times * n for sum_, n in zip((multiplied, added, whole), each, strict=True))
    found: list[float] = []
    for cost in _PICOJOULES.values():
        found += [multiplied * cost[floats][0], added * cost[floats][1] + whole * cost["int8"][1]]
    return Energy(*found)


def _products(model: nn.Module) -> Iterator[tuple[int, int, float, LinearSpec]]:
    """Inputs and outputs of every product of a token with weights, how often it is taken, and its kind."""
    share: dict[nn.Module, float] = {}
    for module in model.modules():
        idle = int(getattr(module, "inactive_parameters", 0))
        banks = [bank for bank in module.modules() if isinstance(bank, LinearBank)]
        if idle and banks:
            share |= dict.fromkeys(banks, 1 - idle / sum(bank.weight.numel() for bank in banks))
    for module in model.modules():
        if isinstance(module, LinearBank):
            yield module.weight.shape[1], module.out_features, module.count * share.get(module, 1.0), module.spec
        elif isinstance(spec := getattr(module, "spec", None), LinearSpec):
            yield int(module.in_features), int(module.out_features), 1.0, spec  # type: ignore[arg-type]
    table, head = getattr(model, "embedding", None), getattr(model, "head", None)
    if head is not None and getattr(head, "out", head) is None and table is not None:
        V, E = table.table().shape
        yield E, V, 1.0, resolve("linear", "dense")()  # type: ignore[misc]


def measure(model: nn.Module, context: int = 1024, dtype: torch.dtype = torch.float32) -> Measures:
    """Count a model that will see sequences of `context` tokens, its decode state held in `dtype`."""
    # weights in packed bytes are no parameters, and are multiplied with all the same
    packed = sum(int(getattr(module, "packed_parameters", 0)) for module in model.modules())
    total = packed + sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # a module with parts that a token may skip (experts) says how many of its parameters one token does not meet
    idle = sum(int(getattr(module, "inactive_parameters", 0)) for module in model.modules())
    embedding = getattr(model, "embedding", None)
    inputs = sum(p.numel() for p in embedding.parameters()) if embedding is not None else 0
    if isinstance(project := getattr(embedding, "project", None), nn.Module):
        inputs -= sum(p.numel() for p in project.parameters())  # a product like any other, not a table
    for stack in getattr(model, "stacks", {}).values():
        if stack.absolute is not None:
            inputs += sum(p.numel() for p in stack.positions[stack.absolute].parameters())
    table = embedding.table() if embedding is not None else None
    head = getattr(model, "head", None)
    tied = table is not None and head is not None and getattr(head, "out", head) is None
    shared = table.numel() if tied and table is not None else 0
    active = total - idle - inputs + shared
    attentions = [module for module in model.modules() if hasattr(module, "flops")]
    causal = getattr(model, "decoder", None) is not None
    mean = (context + 1) / 2 if causal else float(context)
    matrices = 2.0 * (active - _vectors(model))
    forward = matrices + sum(module.flops(mean) for module in attentions)  # type: ignore[operator]
    # feed-forwards cost the same in both
    decode = matrices + sum(getattr(module, "decode_flops", module.flops)(context) for module in attentions)  # type: ignore[operator]
    slots = [slot for part in model.state_spec().values() for slot in part] if hasattr(model, "state_spec") else []  # type: ignore[operator]
    growing = sum(slot.bytes(dtype) for slot in slots if slot.growth == "growing")
    fixed = sum(
        slot.bytes(dtype) * (slot.size if slot.growth == "ring" else 1)
        for slot in slots
        if slot.growth in ("ring", "recurrent")
    )
    held = sum(p.numel() for p in model.parameters()) * dtype.itemsize + sum(b.nbytes for b in model.buffers())
    return Measures(
        trained,
        active,
        total - idle,
        sum(b.numel() for b in model.buffers()),
        growing,
        fixed,
        3.0 * forward,
        decode,
        context,
        held,
        held + sum(_saved(module, dtype) for module in model.modules() if isinstance(module, Linear)),
    )


def _saved(module: Linear, dtype: torch.dtype) -> int:
    """Bytes that packing a projection adds: a number below zero, or 0 where there is no packed form."""
    to = module.spec.packed_bytes(module.in_features, module.slices)
    return 0 if to is None else to - module.weight.numel() * dtype.itemsize


def _vectors(model: nn.Module) -> int:
    """Parameters that multiply no vector of the stream: gains, biases."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.dim() < 2)
