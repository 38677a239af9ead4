"""Vision: image tokenizers, masked image modelling, and a linear probe of what an encoder learned (BEiT, Bao et al.
2022, arXiv 2106.08254). Pictures go through the backbone of all models, as patches.

The parts are found by the registry: objectives `masked_image`, `image_classification` and `discrete_vae`, model
`discrete_vae`. Importing this package imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchstone.vision.linear_probe import Probed, features, probe
    from torchstone.vision.tokenizers import KMeansTokenizer, fit_k_means, load_tokenizer

__all__ = ["KMeansTokenizer", "Probed", "features", "fit_k_means", "load_tokenizer", "probe"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    home = "linear_probe" if name in ("Probed", "features", "probe") else "tokenizers"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
