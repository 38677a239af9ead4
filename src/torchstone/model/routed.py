"""Which layers of a decoder send tokens to experts, and what they chose.

Shapes: B rows, T tokens, L routed layers, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from torchstone.model.feedforward.router import Router

__all__ = ["routed_layers", "routes_of"]


def routed_layers(model: nn.Module) -> dict[str, Router]:
    """Routers of a decoder's layers by path, in order; taps of their choices are called ``path.experts``."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Router) and path.startswith("decoder.layers.")
    }


def routes_of(model: nn.Module, seen: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Recorded choices of all routed layers side by side, (B, T, L, K), in the order of experts' numbers; K is that of
    the layer that takes most, and -1 stands behind the experts of one that takes fewer."""
    routers = routed_layers(model)
    K = max(router.K for router in routers.values())
    sorted_LBTK = [seen[f"{path}.experts"].sort(-1).values for path in routers]
    return torch.stack([F.pad(each_BTK, (0, K - each_BTK.shape[-1]), value=-1) for each_BTK in sorted_LBTK], 2)
