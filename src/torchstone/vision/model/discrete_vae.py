"""A discrete variational autoencoder, whose codes are visual tokens (van den Oord et al. 2017, arXiv 1711.00937; with
Gumbel-softmax, Jang et al. 2016, arXiv 1611.01144, as DALL-E has it, Ramesh et al. 2021, arXiv 2102.12092).

    l = encoder(x),  q = softmax(l)
    y = softmax((l + g) / tau), g ~ Gumbel,  in training;   y = onehot(argmax l)  otherwise
    x' = decoder(y C),  C the codebook

Each stage of the encoder is a convolution that halves the picture, of the decoder one that doubles it; between them a
block of two convolutions beside the stream. tau goes down from `temperature` to `coldest` along half a cosine over the
first `anneal` steps of training. Pixels x from 0 to 1 enter as 0.8 x + 0.1 (DALL-E's map; here that keeps them off the
ends), and the decoder's values leave by its inverse.

B pictures, C channels, I pixels of a side, h = I / s codes of a side, K codes, D numbers of a code.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.model import ModelSpec
from torchstone.ops import noise

__all__ = ["DiscreteVAE", "DiscreteVAESpec", "Reconstructed"]


class DiscreteVAESpec(ModelSpec):
    """Pictures as a grid of codes and back: an image tokenizer."""

    example: ClassVar[str | None] = "images"
    paper: ClassVar[str] = "Ramesh et al. 2021, arXiv 2102.12092"

    codes: int = Field(8192, ge=2, le=2**20)
    """Number of codes (K)."""
    dim: int = Field(128, ge=1, le=2**14)
    """Numbers of a code in the codebook (D)."""
    width: int = Field(64, ge=1, le=2**14)
    """Channels of hidden layers."""
    stages: int = Field(3, ge=1, le=6)
    """Halvings of a picture: a code stands for 2^stages pixels of a side."""
    channels: int | None = Field(None, ge=1, le=2**12)
    """Channels of a pixel; null takes those of the data."""
    image: int | None = Field(None, ge=1, le=2**14)
    """Pixels of a side of the pictures it is trained on; null takes those of the data."""
    temperature: float = Field(1.0, gt=0, le=100)
    """tau before the first step."""
    coldest: float = Field(1 / 16, gt=0, le=100)
    """tau at the end."""
    anneal: int = Field(1000, ge=0, lt=10**8)
    """Steps until then."""

    @model_validator(mode="after")
    def _divides(self) -> DiscreteVAESpec:
        if self.image is not None and self.image % self.stride:
            raise ValueError(f"stages: {self.stages} halvings do not divide an image of {self.image} pixels")
        return self

    @property
    def stride(self) -> int:
        """Pixels of a side that one code stands for."""
        return int(2**self.stages)

    def build(self) -> nn.Module:
        if self.channels is None:
            raise TorchstoneError("model.channels: is not known before the data are; set it")
        return DiscreteVAE(self)


class Reconstructed(NamedTuple):
    """What a forward gives: pixels (B, C, I, I), and logits of codes (B, K, h, h)."""

    pixels: torch.Tensor
    logits: torch.Tensor


class _Conv(nn.Module):
    """A convolution with a bias: of 3 x 3 or 1 x 1 in place, or of 4 x 4 to half the size, or (`up`) to twice."""

    def __init__(self, k_in: int, k_out: int, size: int, up: bool = False) -> None:
        super().__init__()
        shape = (k_in, k_out, size, size) if up else (k_out, k_in, size, size)
        self.weight, self.bias = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(k_out))
        self.size, self.up = size, up

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        if name == "bias":
            parameter.zero_()
            return
        inputs = self.weight.shape[0] * 4 if self.up else self.weight[0].numel()  # an output of 4 x 4 at stride 2
        parameter.normal_(0, (2 / inputs) ** 0.5, generator=generator)

    def forward(self, x_BKHH: torch.Tensor) -> torch.Tensor:
        if self.up:
            return F.conv_transpose2d(x_BKHH, self.weight, self.bias, stride=2, padding=1)
        if self.size == 4:
            return F.conv2d(x_BKHH, self.weight, self.bias, stride=2, padding=1)
        return F.conv2d(x_BKHH, self.weight, self.bias, padding=self.size // 2)


class _Block(nn.Module):
    """``x + conv(relu(conv(relu(x))))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _Conv(width, width, 3), _Conv(width, width, 1)

    def forward(self, x_BKHH: torch.Tensor) -> torch.Tensor:
        return x_BKHH + self.conv2(torch.relu(self.conv1(torch.relu(x_BKHH))))


class DiscreteVAE(nn.Module):
    """See the module's docstring. An `ImageTokenizer` too."""

    def __init__(self, spec: DiscreteVAESpec) -> None:
        super().__init__()
        assert spec.channels is not None
        self.spec = spec
        self.codes, self.channels, self.stride = spec.codes, spec.channels, spec.stride
        self.temperature = spec.temperature
        W = spec.width
        self.down = nn.ModuleList(_Conv(W if i else self.channels, W, 4) for i in range(spec.stages))
        self.encode = _Block(W)
        self.to_codes = _Conv(W, spec.codes, 1)
        self.codebook = nn.Parameter(torch.empty(spec.codes, spec.dim))
        self.from_codes = _Conv(spec.dim, W, 1)
        self.decode = _Block(W)
        self.up = nn.ModuleList(_Conv(W, W, 4, up=True) for _ in range(spec.stages))
        self.to_pixels = _Conv(W, self.channels, 1)

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        parameter.normal_(0, 1, generator=generator)

    def before_step(self, step: int) -> None:
        """Set the temperature of a step of training."""
        done = min(1.0, step / self.spec.anneal) if self.spec.anneal else 1.0
        share = (1 + math.cos(math.pi * done)) / 2
        self.temperature = self.spec.coldest + (self.spec.temperature - self.spec.coldest) * share

    def logits(self, pixels_BCII: torch.Tensor) -> torch.Tensor:
        """Scores of the codes, (B, K, h, h).

        Raises:
            TorchstoneError: pixels of another shape.
        """
        side = pixels_BCII.shape[-1]
        if pixels_BCII.shape[1:] != (self.channels, side, side) or side % self.stride:
            raise TorchstoneError(
                f"model discrete_vae: takes {self.channels} channels and squares whose side {self.stride} divides, got "
                f"{' x '.join(map(str, pixels_BCII.shape[1:]))}"
            )
        h_BWHH = 0.8 * pixels_BCII.to(self.codebook.dtype) + 0.1
        for layer in self.down:
            h_BWHH = torch.relu(layer(h_BWHH))
        return self.to_codes(self.encode(h_BWHH))

    def tokens(self, pixels_BCII: torch.Tensor) -> torch.Tensor:
        """The likeliest codes, (B, h, h)."""
        return self.logits(pixels_BCII).argmax(1)

    def pixels(self, code_BDhh: torch.Tensor) -> torch.Tensor:
        """Pixels (B, C, I, I) of vectors of the codebook, or of mixtures of them."""
        h_BWHH = self.decode(self.from_codes(code_BDhh))
        for layer in self.up:
            h_BWHH = torch.relu(layer(h_BWHH))
        return (self.to_pixels(h_BWHH) - 0.1) / 0.8

    def forward(self, pixels_BCII: torch.Tensor, key: torch.Tensor | None = None) -> Reconstructed:
        """Reconstruct pictures, from soft samples of codes with a key, from the likeliest codes without."""
        l_BKhh = self.logits(pixels_BCII)
        if key is None:
            code_BDhh = self.codebook[l_BKhh.argmax(1)].permute(0, 3, 1, 2)
        else:
            g_BKhh = noise.gumbel(key, l_BKhh.numel()).view_as(l_BKhh).to(l_BKhh.dtype)
            y_BKhh = ((l_BKhh + g_BKhh) / self.temperature).softmax(1)
            code_BDhh = torch.einsum("bkij,kd->bdij", y_BKhh, self.codebook)
        return Reconstructed(self.pixels(code_BDhh), l_BKhh)
