"""How routers choose: load and fluctuation of the experts of a model.

Fluctuation is the share of choices that another model, as an earlier checkpoint, does not make for the same token (Dai
et al. 2022, arXiv 2204.08396, section 2): 0 if every token goes to the same experts.

Shapes: B rows, T tokens, E experts, K of them active.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.model.taps import Taps
from torchstone.model.tokens import Tokens

__all__ = ["expert_choices", "routing_fluctuation"]


@torch.no_grad()
def expert_choices(model: nn.Module, inputs: torch.Tensor | Tokens) -> dict[str, torch.Tensor]:
    """The experts (B, T, K) that a model's layers choose in evaluation, by path of the router.

    Raises:
        TorchstoneError: the model has no experts.
    """
    taps, training = Taps(record=["*.router.experts"]), model.training
    model.eval()
    try:
        model(inputs, outputs="none", taps=taps)
    finally:
        model.train(training)
    if not taps.seen:
        raise TorchstoneError("expert choices: no layer of this model has a router; ffn moe has one")
    return {name.removesuffix(".experts"): experts for name, experts in taps.seen.items()}


def routing_fluctuation(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], valid_BT: torch.Tensor | None = None
) -> dict[str, float]:
    """By path of the router, the share of choices in `after` that `before` has not for the same token.

    Raises:
        TorchstoneError: the two are not of the same layers and tokens.
    """
    if {name: x.shape for name, x in before.items()} != {name: x.shape for name, x in after.items()}:
        raise TorchstoneError("routing fluctuation: the choices are not of the same layers, tokens and experts a token")
    changed = {}
    for name, experts_BTK in after.items():
        new_BTK = (experts_BTK[..., None] != before[name][..., None, :]).all(-1).double()
        changed[name] = (new_BTK if valid_BT is None else new_BTK[valid_BT]).mean().item()
    return changed
