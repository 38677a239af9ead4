"""A residual network with normalisation before each convolution (He et al. 2016, arXiv 1603.05027), for small images.

A convolution of 3 x 3 without stride; stages of blocks, of which each but the first halves the image and doubles the
channels; batch normalisation, ReLU, the mean over all places. With 64 channels and four stages of two blocks it is
PreActResNet-18, the network of Pang et al. 2022 on CIFAR-10.

    h = relu(norm1(x));  y = conv2(relu(norm2(conv1(h)))) + (shortcut(h), or x where nothing changes shape)

B examples, K channels of a layer, H places of a side.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from torchstone.trust.model._classifier import BatchNorm, Classifier, ClassifierSpec, Passing, he

__all__ = ["PreActResNetSpec"]


class PreActResNetSpec(ClassifierSpec):
    """A residual network with normalisation before each convolution."""

    paper: ClassVar[str] = "He et al. 2016, arXiv 1603.05027"

    width: int = Field(64, ge=1, le=2**12)
    """Channels of the first stage; each further one has twice those of the one before."""
    blocks: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = Field((2, 2, 2, 2), min_length=1, max_length=8)
    """Blocks of each stage: [2, 2, 2, 2] is PreActResNet-18, [3, 4, 6, 3] PreActResNet-34."""

    def build(self) -> nn.Module:
        backbone = _Stages(self.size("channels"), self.size("image"), self.width, self.blocks)
        return Classifier(self, backbone, self.width << (len(self.blocks) - 1))


class _Conv(nn.Module):
    """A convolution without bias that keeps places (padding half its size), or every `stride`-th of them."""

    def __init__(self, k_in: int, k_out: int, size: int, stride: int, places: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(k_out, k_in, size, size))
        self.stride, self.padding, self.places = stride, size // 2, places

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        he(parameter, "up", generator)

    def forward(self, x_BKHH: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x_BKHH, self.weight, stride=self.stride, padding=self.padding)

    def flops(self, context: float) -> float:
        """What a weight costs beyond one product: it is used at every place."""
        return 2.0 * self.weight.numel() * (self.places - 1)


class _Block(nn.Module):
    """(B, K, H, H) -> (B, K', H', H'). `side` is H'."""

    def __init__(self, k_in: int, k_out: int, stride: int, side: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = BatchNorm(k_in), BatchNorm(k_out)
        self.conv1 = _Conv(k_in, k_out, 3, stride, side**2)
        self.conv2 = _Conv(k_out, k_out, 3, 1, side**2)
        self.shortcut = _Conv(k_in, k_out, 1, stride, side**2) if stride != 1 or k_in != k_out else None

    def forward(self, x_BKHH: torch.Tensor, passing: Passing) -> torch.Tensor:
        h_BKHH = torch.relu(self.norm1(x_BKHH, passing))
        kept_BKHH = x_BKHH if self.shortcut is None else self.shortcut(h_BKHH)
        return self.conv2(torch.relu(self.norm2(self.conv1(h_BKHH), passing))) + kept_BKHH


class _Stages(nn.Module):
    """(B, channels, I, I) -> (B, D). Taps: ``blocks.0``, ... behind each block."""

    def __init__(self, channels: int, image: int, width: int, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = _Conv(channels, width, 3, 1, image**2)
        self.blocks, k_in, side = nn.ModuleList(), width, image
        for stage, count in enumerate(blocks):
            for number in range(count):
                stride = 2 if stage and not number else 1
                side = -(-side // stride)
                self.blocks.append(_Block(k_in, width << stage, stride, side))
                k_in = width << stage
        self.norm = BatchNorm(k_in)

    def forward(self, pixels: torch.Tensor, passing: Passing) -> torch.Tensor:
        x_BKHH = self.stem(pixels)
        for number, block in enumerate(self.blocks):
            x_BKHH = passing.tap(f"blocks.{number}", block(x_BKHH, passing))
        return torch.relu(self.norm(x_BKHH, passing)).mean((2, 3))
