"""Image tokenizers: from pictures to a grid of codes, which masked image modelling predicts.

A tokenizer is any module with `codes`, `channels`, `stride` and ``tokens(pixels)``: a trained `discrete_vae`, or
`KMeansTokenizer`, whose code of a patch is the nearest of K means of patches (Lloyd 1982). The k-means are fitted once,
without a trainer, and lie in one file.

B pictures, C channels, I pixels of a side, s stride (pixels of a code's side), N patches, P = C s^2 numbers of a patch,
K codes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.files import full_disk, write_bytes
from torchstone.keys import Key
from torchstone.model.embedding.patch import cut

__all__ = ["ImageTokenizer", "KMeansTokenizer", "fit_k_means", "load_tokenizer"]


@runtime_checkable
class ImageTokenizer(Protocol):
    """What masked image modelling asks of a tokenizer."""

    codes: int
    """Number of codes."""
    channels: int
    """Channels of the pictures that it takes."""
    stride: int
    """Pixels of a side that one code stands for."""

    def tokens(self, pixels_BCII: torch.Tensor) -> torch.Tensor:
        """Codes (B, I / s, I / s) of pixels from 0 to 1."""
        ...


class KMeansTokenizer(nn.Module):
    """The nearest of K means, for each patch."""

    means_KP: torch.Tensor

    def __init__(self, means_KP: torch.Tensor, stride: int, channels: int) -> None:
        super().__init__()
        self.codes, self.stride, self.channels = len(means_KP), stride, channels
        self.register_buffer("means_KP", means_KP)

    def tokens(self, pixels_BCII: torch.Tensor) -> torch.Tensor:
        side = pixels_BCII.shape[-1] // self.stride
        patches_BNP = cut(pixels_BCII.to(self.means_KP.dtype), self.stride)
        return _nearest(patches_BNP.flatten(0, 1), self.means_KP)[0].view(-1, side, side)

    def save(self, path: str | Path) -> None:
        """Write it to one safetensors file.

        Raises:
            TorchstoneError: something lies there, or nothing can be written.
        """
        from safetensors.torch import save

        path = Path(path)
        if path.exists():
            raise TorchstoneError(f"{path}: exists; choose another file")
        facts = {"kind": "k_means", "stride": self.stride, "channels": self.channels}
        with full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, save({"means": self.means_KP}, {"tokenizer": json.dumps(facts)}))

    @classmethod
    def load(cls, path: str | Path) -> KMeansTokenizer:
        """What `save` wrote.

        Raises:
            TorchstoneError: the file holds no tokenizer of this kind.
        """
        from safetensors import safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                facts = json.loads((file.metadata() or {})["tokenizer"])
                means, stride, channels = file.get_tensor("means"), int(facts["stride"]), int(facts["channels"])
        except Exception as error:  # of a file of something else each step fails in a way of its own
            raise TorchstoneError(f"{path}: holds no k-means tokenizer ({type(error).__name__}: {error})") from None
        if means.dim() != 2 or means.shape[1] != channels * stride**2:
            raise TorchstoneError(
                f"{path}: its means are {tuple(means.shape)}, patches {channels} x {stride} x {stride}"
            )
        return cls(means, stride, channels)


def load_tokenizer(path: str, load: Callable[[str], nn.Module]) -> nn.Module:
    """The tokenizer of a file of k-means, or of a run's directory, which `load` gives.

    Raises:
        TorchstoneError: there is none.
    """
    if Path(path).is_file():
        return KMeansTokenizer.load(path)
    model = load(path)
    if not isinstance(model, ImageTokenizer):
        raise TorchstoneError(f"{path}: its model ({getattr(model.spec, 'kind', None)}) is no image tokenizer")
    return model


def _nearest(points_NP: torch.Tensor, means_KP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of the nearest mean (N,), the first among equals, and the squared distance to it (N,)."""
    pairs = [torch.cdist(some, means_KP).min(1) for some in points_NP.split(1 << 16)]
    distance_N = torch.cat([pair.values for pair in pairs])
    return torch.cat([pair.indices for pair in pairs]), distance_N.square()


def fit_k_means(
    pictures: Iterable[torch.Tensor],
    codes: int,
    stride: int,
    *,
    seed: int = 0,
    iterations: int = 100,
    patches: int = 200_000,
) -> KMeansTokenizer:
    """K means of the patches of pictures: k-means++ (Arthur and Vassilvitskii 2007) and Lloyd's steps until nothing
    moves.

    Args:
        pictures: batches of pixels (B, C, I, I).
        codes: K.
        stride: pixels of a patch's side.
        seed: of all draws.
        iterations: Lloyd's steps, at most.
        patches: patches that are looked at, drawn from all.

    Raises:
        TorchstoneError: the stride does not divide the pictures, or there are fewer different patches than codes.
    """
    if codes < 2 or stride < 1 or iterations < 1 or patches < codes:
        raise TorchstoneError(f"k-means: needs 2 codes or more, a stride, and as many patches, not {codes}, {stride}")
    found, channels, key = [], 1, Key(seed).fold("k-means")
    for number, pixels_BCII in enumerate(pictures):
        channels, side = pixels_BCII.shape[1], pixels_BCII.shape[-1]
        if side % stride:
            raise TorchstoneError(f"k-means: patches of {stride} pixels do not divide pictures of {side}")
        every_NP = cut(pixels_BCII, stride).flatten(0, 1)
        kept = torch.randperm(len(every_NP), generator=key.fold(number).generator())[:patches]
        found.append(every_NP[kept])
    points_NP = torch.cat(found)
    kept = torch.randperm(len(points_NP), generator=key.fold("chosen").generator())[:patches]
    points_NP = points_NP[kept].double()
    if (different := len(points_NP.unique(dim=0))) < codes:
        raise TorchstoneError(f"k-means: {codes} codes, and the pictures have {different:,} different patches")
    means_KP = _seeds(points_NP, codes, key.fold("seeds").generator())
    for _ in range(iterations):
        of_N, distance_N = _nearest(points_NP, means_KP)
        counts_K = torch.bincount(of_N, minlength=codes)
        moved_KP = torch.zeros_like(means_KP).index_add_(0, of_N, points_NP) / counts_K.clamp(min=1)[:, None]
        # a mean that nobody is nearest to goes where the worst served points are
        empty = counts_K == 0
        moved_KP[empty] = points_NP[distance_N.topk(int(empty.sum())).indices]
        if torch.equal(moved_KP, means_KP):
            break
        means_KP = moved_KP
    return KMeansTokenizer(means_KP.float(), stride, channels)


def _seeds(points_NP: torch.Tensor, codes: int, generator: torch.Generator) -> torch.Tensor:
    """First means: points, each drawn in proportion to its squared distance from those before it."""
    means = [points_NP[torch.randint(len(points_NP), (1,), generator=generator)]]
    distance_N = (points_NP - means[0]).square().sum(1)
    while len(means) < codes:
        total_N = distance_N.cumsum(0)
        drawn = torch.rand((), generator=generator, dtype=torch.float64) * total_N[-1]
        at = torch.searchsorted(total_N, drawn, right=True).clamp(max=len(points_NP) - 1)
        means.append(points_NP[at][None])
        distance_N = torch.minimum(distance_N, (points_NP - means[-1]).square().sum(1))
    return torch.cat(means)
