"""Post-norm whose weights start smaller the deeper their layer (METRO-LM; Bajaj et al. 2022, arXiv 2204.06644).

    std of W_out and W_down in layer l = std / sqrt(2 l),   l = 1, 2, ...

All other weights start as under `post`.
"""

from __future__ import annotations

import math
from typing import ClassVar

from torchstone.model.residual import normal
from torchstone.model.residual.post import PostSpec
from torchstone.model.site import Initialise, Site

__all__ = ["PostScaledSpec"]


class PostScaledSpec(PostSpec):
    """Post-norm, and outputs of layer l (from 1) that start smaller by 1 / sqrt(2 l)."""

    paper: ClassVar[str] = "Bajaj et al. 2022, arXiv 2204.06644"

    def rule(self, site: Site) -> Initialise:
        return normal(self.std, 1.0 if site.layer is None else 1 / math.sqrt(2 * (site.layer + 1)))
