"""LoRA in PEFT's layout: adapter_config.json and adapter_model.safetensors.

PEFT adapts whole modules of its base model. Where a module of theirs is one slice of a fused projection of ours, its A
and B are that slice's. Where it holds several slices of ours (GPT-2's c_attn), their ranks add up: A of all of them
stacked, B block by block, and zeros for a slice that is not adapted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from torchstone.errors import TorchstoneError
from torchstone.interop.layout import TRANSPOSED, HeadByHead, Layout
from torchstone.model.linear.lora import LoraLinear, LoraSpec
from torchstone.model.transformer import TransformerSpec
from torchstone.train.run import shape_of

if TYPE_CHECKING:
    from torchstone.train.checkpoint import TensorFile
    from torchstone.train.run import RunFolder

__all__ = ["adapter"]

_TASKS = {"lm": "CAUSAL_LM", "classification": "SEQ_CLS"}


def adapter(
    run: RunFolder, spec: TransformerSpec, file: TensorFile, layout: Layout | None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The adapter's config and tensors. Without a `layout`, modules have our own names, as in `torchstone.interop.hf`.

    Raises:
        TorchstoneError: the run has no LoRA, or has one on a module that PEFT would take for another.
    """
    model = shape_of(spec)
    adapted = {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}
    if not adapted:
        raise TorchstoneError(f"{run.path}: has no LoRA to export (its linear is {spec.linear.kind})")
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    transposed = False
    for path, module in adapted.items():
        own = {part: file.get(f"{path}.{part}") for part in ("lora_a", "lora_b")}
        module.load_state_dict(
            {"weight": torch.empty(module.weight.shape, device="meta"), **own}, assign=True, strict=False
        )
        transform = None if layout is None else _rule(layout, f"{path}.weight")[1]
        for theirs, slices in _modules(path, module, layout):
            a_RI, b_OR = _joined(module, slices)
            if a_RI.shape[0] == 0:
                continue
            if layout is not None and theirs.endswith(layout.misread):
                raise TorchstoneError(
                    f"{run.path}: PEFT takes {theirs} of a {layout.model_type} model for one of an expert's, and would "
                    "compute something else; export it merged (--to hf), or adapt other roles"
                )
            if isinstance(transform, HeadByHead):  # rows of B are rows of the weight
                (b_OR,) = transform.at(spec, module.slices).split(b_OR, (b_OR.shape[0],))
            tensors[f"base_model.model.{theirs}.lora_A.weight"] = a_RI.contiguous()
            tensors[f"base_model.model.{theirs}.lora_B.weight"] = b_OR.contiguous()
            ranks[theirs] = a_RI.shape[0]
        transposed = transposed or transform is TRANSPOSED
    lora: LoraSpec = next(iter(adapted.values())).spec
    pattern = {name: rank for name, rank in ranks.items() if rank != lora.rank}
    base = run.recipe.init_from
    config = {
        "peft_type": "LORA",
        "task_type": _TASKS.get(spec.head.kind),
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "rank_pattern": pattern,
        "alpha_pattern": {name: lora.scale * rank for name, rank in pattern.items()},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
    }
    return config, tensors


def _rule(layout: Layout, name: str) -> tuple[tuple[str, ...], Any]:
    """Their names for a parameter of ours, and the transform between."""
    for rule in layout.rules:
        if (theirs := rule.match(name)) is not None:
            return theirs, rule.transform
    raise TorchstoneError(f"the {layout.model_type} layout has no place for the parameter {name}")


def _modules(path: str, module: LoraLinear, layout: Layout | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Their modules for one of ours, and the numbers of our slices that each holds."""
    if layout is None:
        yield path, tuple(range(len(module.slices)))
        return
    theirs, _ = _rule(layout, f"{path}.weight")
    names = [name.removesuffix(".weight") for name in theirs]
    if len(names) == 1:
        yield names[0], tuple(range(len(module.slices)))
    else:
        yield from ((name, (i,)) for i, name in enumerate(names))


def _joined(module: LoraLinear, slices: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A (R', I) and B (O', R') of several slices as one."""
    updates = module.slice_updates()
    present = [updates[i] for i in slices if i in updates]
    a = torch.cat([a for a, _ in present]) if present else torch.empty(0, module.in_features)
    b = torch.zeros(sum(module.slices[i] for i in slices), a.shape[0])
    row = column = 0
    for i in slices:
        if i in updates:
            b_i = updates[i][1]
            b[row : row + b_i.shape[0], column : column + b_i.shape[1]] = b_i
            column += b_i.shape[1]
        row += module.slices[i]
    return a.detach(), b.detach()
