"""Gated retention (Sun et al. 2024, arXiv 2405.05254, section 3.1): retention whose decay each token decides.

    log decay = log sigmoid(x W) / temperature, one number a head and token

Three equal forms, the norm of each head and the output gate are those of retention. A head whose decays are near one
adds up nearly all of the past; only its norm keeps the numbers small.

Shapes: B rows, T tokens, D width, H heads.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field

from torchstone.model.attention import Attention
from torchstone.model.attention._decayed import Decayed, DecayedSpec
from torchstone.model.context import Context
from torchstone.model.site import Site
from torchstone.ops import at_least_float32

__all__ = ["GatedRetention", "GatedRetentionSpec"]


class GatedRetentionSpec(DecayedSpec):
    """Retention with a decay that depends on the token: sigmoid(x W) to the power 1 / temperature."""

    paper: ClassVar[str] = "Sun et al. 2024, arXiv 2405.05254"

    temperature: float = Field(16.0, gt=0)
    """The larger, the nearer decays are to one."""

    def build(self, site: Site) -> Attention:
        return GatedRetention(self, site)


class GatedRetention(Decayed):
    """Decays are made from the tokens."""

    def __init__(self, spec: GatedRetentionSpec, site: Site) -> None:
        super().__init__(spec, site)
        self.temperature = spec.temperature
        self.decay = site.linear(self.D, self.H, "gate")

    def log_decay(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        """(B, H, T)."""
        log_decay_BTH = F.logsigmoid(at_least_float32(self.decay(x_BTD))) / self.temperature
        return ctx.tap("log_decay", log_decay_BTH.transpose(1, 2))
