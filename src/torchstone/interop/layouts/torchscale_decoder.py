"""TorchScale's `Decoder` and `LongNetDecoder` (Ma et al. 2022, arXiv 2211.13184); see `_torchscale`.

Names may begin with ``decoder.``, as in a checkpoint of fairseq's language modelling.
"""

from __future__ import annotations

from torchstone.interop.layouts._torchscale import one_stack

__all__ = ["LAYOUT"]

LAYOUT = one_stack("decoder")
