"""TorchScale's `Encoder` and `LongNetEncoder` (Ma et al. 2022, arXiv 2211.13184); see `_torchscale`.

Names may begin with ``encoder.``. Positions here count no padding on the left, theirs do. Keys of padding at the end
that TorchScale's dilated attention makes up to fill a segment, with a score of 0, are none here.
"""

from __future__ import annotations

from torchstone.interop.layouts._torchscale import one_stack

__all__ = ["LAYOUT"]

LAYOUT = one_stack("encoder")
