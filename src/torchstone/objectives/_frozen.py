"""Objectives that read a frozen model of another run beside the one that trains: a reference, a teacher."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.objectives import Facts, Objective

__all__ = ["WithReference", "fingerprint", "reference_of"]


def reference_of(kind: str, what: str, run: str | None, facts: Facts) -> nn.Module:
    """The model of a run that an objective reads, what it is called in messages.

    Raises:
        TorchstoneError: no run is named or none can be loaded here; it knows fewer tokens than the tokenizer has, or
            others.
    """
    if run is None:
        raise TorchstoneError(f"objective {kind}: needs a {what}: the directory of a run, or the recipe's init_from")
    if facts.load is None:
        raise TorchstoneError(f"objective {kind}: needs a {what}, and no run can be loaded here")
    model = facts.load(run)
    known = getattr(getattr(model, "spec", None), "vocabulary", None)
    if known is not None and facts.vocabulary is not None and known < facts.vocabulary:
        raise TorchstoneError(
            f"objective {kind}: the {what} {run} knows {known:,} tokens, fewer than the tokenizer's "
            f"{facts.vocabulary:,}"
        )
    theirs = None if facts.tokenizer_of is None or facts.tokenizer is None else facts.tokenizer_of(run)
    if theirs is not None and not facts.tokenizer.agrees(theirs):
        raise TorchstoneError(
            f"objective {kind}: the {what} {run} was trained with another tokenizer; set data.tokenizer: "
            f"{{kind: file, path: {run}/tokenizer.json}}"
        )
    return model


class WithReference(Objective):
    """An objective with a frozen model, which moves with it, and is neither trained nor saved.

    Args:
        kind: the objective's name, for messages.
        reference: the model; None for an objective that has none this time.
        name: where it is from.
        what: what it is called.
    """

    def __init__(self, kind: str, reference: nn.Module | None, name: str, what: str = "reference") -> None:
        super().__init__()
        self.kind, self.name, self.what = kind, name, what
        if reference is None:
            return
        # kept from the module's own children: neither the optimiser nor a checkpoint may see its weights
        self.__dict__["reference"] = reference.eval().requires_grad_(False)
        self._digest = fingerprint(reference)
        self.register_buffer("digest", torch.tensor(list(bytes.fromhex(self._digest)), dtype=torch.uint8))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self.reference is not None:
            self.reference._apply(fn, recurse)  # it moves to the device with the objective
        return super()._apply(fn, recurse)

    def check(self, model: nn.Module) -> None:
        if self.reference is not None and bytes(self.digest.tolist()).hex() != self._digest:  # type: ignore[operator]
            raise TorchstoneError(
                f"objective {self.kind}: the {self.what} {self.name} holds other weights than when this training began"
            )


def fingerprint(model: nn.Module) -> str:
    """64 hexadecimal digits that identify a model's weights: names, shapes, types and bits."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(f"{name}:{tuple(value.shape)}:{value.dtype};".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
