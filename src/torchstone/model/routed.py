"""Which layers of a decoder send tokens to experts."""

from __future__ import annotations

from torch import nn

from torchstone.model.feedforward.router import Router

__all__ = ["routed_layers"]


def routed_layers(model: nn.Module) -> dict[str, Router]:
    """Routers of a decoder's layers by path, in order; taps of their choices are called ``path.experts``."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Router) and path.startswith("decoder.layers.")
    }
