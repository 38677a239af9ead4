"""What a model costs: parameters, decode state, arithmetic. Counted on any device, the meta device too.

FLOPs are multiply-adds times two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["Measures", "measure"]


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


def measure(model: nn.Module, context: int = 1024, dtype: torch.dtype = torch.float32) -> Measures:
    """Count a model that will see sequences of `context` tokens, its decode state held in `dtype`."""
    total = sum(parameter.numel() for parameter in model.parameters())
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
    )


def _vectors(model: nn.Module) -> int:
    """Parameters that multiply no vector of the stream: gains, biases."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.dim() < 2)
