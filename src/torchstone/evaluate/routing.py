"""How routers choose: fluctuation of the experts of a model, and what it does to the vectors that it sends to them.

Fluctuation is the share of choices that another model, as an earlier checkpoint, does not make for the same token (Dai
et al. 2022, arXiv 2204.08396, section 2): 0 if every token goes to the same experts. Collapse is how little the
vectors of one expert's tokens differ beside how far apart those of different experts lie (Chi et al. 2022, arXiv
2204.09179).

Shapes: B rows, T tokens, N = B * T, D width, E experts, K of them active.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.model.taps import Taps
from torchstone.model.tokens import Tokens

__all__ = ["expert_choices", "representation_collapse", "routing_fluctuation"]


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


@torch.no_grad()
def representation_collapse(hidden_ND: torch.Tensor, experts_N: torch.Tensor) -> float:
    """Tr(S_W S_B^+), of the covariances of tokens about the means of their experts and of these means about the mean of
    all, each weighed by its tokens: the lower, the more collapsed. S_B has a rank below the number of experts, and
    values below 1e-6 of its largest count as 0.

    Raises:
        TorchstoneError: all tokens have one expert.
    """
    x_ND = hidden_ND.double()
    kinds, group_N, counts_E = experts_N.unique(return_inverse=True, return_counts=True)
    if len(kinds) < 2:
        raise TorchstoneError("representation collapse: all tokens have one expert, and no mean differs from another")
    sums_ED = x_ND.new_zeros(len(kinds), x_ND.shape[1]).index_add(0, group_N, x_ND)
    means_ED = sums_ED / counts_E[:, None]
    inside_ND, between_ND = x_ND - means_ED[group_N], means_ED[group_N] - x_ND.mean(0)
    within_DD, between_DD = inside_ND.T @ inside_ND / len(x_ND), between_ND.T @ between_ND / len(x_ND)
    return float(torch.trace(within_DD @ torch.linalg.pinv(between_DD, rtol=1e-6, hermitian=True)))
