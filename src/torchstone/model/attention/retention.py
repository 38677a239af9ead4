"""Retention (Sun et al. 2023, arXiv 2307.08621, eqs. 5 to 8): scores that decay with distance, and no softmax.

The same layer has three equal forms: one product over all pairs, products within chunks and a sum between them, and a
sum of fixed size that takes one token at a time. Each head has a decay of its own; each head's result is normalised by
its root mean square, so that its scale does not matter, and gated.

Shapes: B rows, T tokens, D width, H heads, V channels of a value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from torchstone.model.attention import Attention
from torchstone.model.attention._decayed import Decayed, DecayedSpec
from torchstone.model.context import Context
from torchstone.model.site import Site

if TYPE_CHECKING:
    from torchstone.model.stack import LayerSpec

__all__ = ["Retention", "RetentionSpec"]


class RetentionSpec(DecayedSpec):
    """Multi-scale retention: decayed sums of keys times values, in parallel, in chunks, or one token at a time."""

    paper: ClassVar[str] = "Sun et al. 2023, arXiv 2307.08621"

    value_expansion: float = Field(2.0, gt=0)
    """Width of all values together, as a multiple of the stream's."""

    def values(self, width: int) -> int:
        return round(self.value_expansion * width)

    def illegal(self, layer: LayerSpec, width: int) -> str | None:
        reason = super().illegal(layer, width)
        if reason is None and (self.values(width) % self.heads or not self.values(width)):
            return f"attention.value_expansion: {self.heads} heads do not divide a width of {self.values(width)}"
        return reason

    def build(self, site: Site) -> Attention:
        return Retention(self, site)


class Retention(Decayed):
    """Decays are constants of the heads."""

    def log_decay(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        """(1, H, 1): log of ``1 - 2^(-5 - h)``."""
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        head_H = torch.arange(self.H, device=x_BTD.device, dtype=dtype)
        return torch.log1p(-(2.0 ** (-5.0 - head_H)))[None, :, None]

    def levelled(self, y_BHTV: torch.Tensor, ctx: Context) -> torch.Tensor:
        """Divided by the root of the sum of decays, ``(1 - decay^n) / (1 - decay)`` at the n-th token of a document."""
        log_decay_1H1 = self.log_decay(y_BHTV, ctx)
        n_B1T = ctx.q.where[:, None].clamp(min=0) + 1
        total_BHT = torch.expm1(log_decay_1H1 * n_B1T) / torch.expm1(log_decay_1H1)
        return y_BHTV / total_BHT.sqrt()[..., None].to(y_BHTV.dtype)
