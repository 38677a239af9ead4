"""Image classifiers: what they share. Pixels in; logits, features, and where there is a head for it the auxiliary
score A of rectified rejection (Pang et al. 2022, arXiv 2105.14785) out.

Batch normalisation takes the statistics of the micro-batch that it sees, so micro-batches of a step differ in it as
they do everywhere. Its running statistics are those of whole steps, over all micro-batches and ranks: a forward hands
its sums on in `aux`, and they move once, after the optimiser (`after_step`). A forward whose `aux` nobody takes, as
those of an attack, leaves no trace.

B examples, C classes, D features, K channels of a layer; pixels are (B, channels, I, I).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.model import ModelSpec
from torchstone.model.context import Aux
from torchstone.model.linear import Linear
from torchstone.model.taps import Taps
from torchstone.spec import Spec, resolve

__all__ = [
    "BatchNorm",
    "Classified",
    "Classifier",
    "ClassifierSpec",
    "Passing",
    "RejectionSpec",
    "classifies_images",
    "dense",
    "he",
]


class RejectionSpec(Spec):
    """The auxiliary head A, which learns what confidence has to be multiplied with to be that of the true class."""

    form: Literal["linear_mlp", "mlp"] = "linear_mlp"
    """The sum of a linear map and of a network of one hidden layer, or the network alone."""
    norm: Literal["batch", "none"] = "batch"
    """Normalisation of the network's hidden layer."""


class ClassifierSpec(ModelSpec):
    """An image classifier. Sizes that are open are those of the data."""

    example: ClassVar[str | None] = "images"

    classes: int | None = Field(None, ge=2, le=2**20)
    """Number of classes; null takes that of the data."""
    channels: int | None = Field(None, ge=1, le=2**12)
    """Channels of a pixel; null takes those of the data."""
    image: int | None = Field(None, ge=1, le=2**14)
    """Pixels of a side; null takes those of the data."""
    mean: tuple[float, ...] | None = None
    """Subtracted from each channel inside the model, so that noise and attacks are in units of pixels; null is 0."""
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """What each channel is divided by after that; null is 1."""
    rejection: RejectionSpec | None = None
    """The auxiliary head of rectified rejection; null is none."""

    @model_validator(mode="after")
    def _standardised(self) -> ClassifierSpec:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != (self.channels or len(values)):
                raise ValueError(f"{name}: has {len(values)} values, and a pixel {self.channels} channels")
        return self

    def size(self, name: Literal["classes", "channels", "image"]) -> int:
        """A size that must be known by now.

        Raises:
            TorchstoneError: it is open.
        """
        value: int | None = getattr(self, name)
        if value is None:
            raise TorchstoneError(f"model.{name}: is not known before the data are; set it")
        return value


class Classified(NamedTuple):
    """What a classifier gives.

    Attributes:
        logits: scores of the classes, (B, C).
        features: what they are read from, (B, D).
        auxiliary: A in (0, 1), (B,); None without the head.
        aux: sums of batch normalisation, for the objective to hand on.
    """

    logits: torch.Tensor
    features: torch.Tensor
    auxiliary: torch.Tensor | None = None
    aux: Aux = {}


def classifies_images(spec: Any) -> bool:
    """Whether a model's spec is that of an image classifier: one of this folder, or a Transformer over patches with a
    head of classes."""
    if isinstance(spec, ClassifierSpec):
        return True
    head, embedding = getattr(spec, "head", None), getattr(spec, "embedding", None)
    return getattr(head, "kind", None) == "classification" and not getattr(embedding, "of_tokens", True)


class Passing:
    """What layers of one forward share: taps, and the sums that they leave."""

    def __init__(self, taps: Taps | None) -> None:
        self.taps = taps
        self.aux: Aux = {}

    def tap(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """`x`, or what a listener put in its place."""
        return x if self.taps is None else self.taps(name, x)


class Classifier(nn.Module):
    """From `backbone`, a module from (pixels, passing) to features (B, D), logits by one linear map.

    Taps: ``features``, ``logits``, ``auxiliary``, and those of the backbone.
    """

    def __init__(self, spec: ClassifierSpec, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.spec, self.backbone = spec, backbone
        self.shape = spec.size("channels"), spec.size("image"), spec.size("image")
        self.head = dense(width, spec.size("classes"), "head")
        self.rejection = None if spec.rejection is None else AuxiliaryHead(spec.rejection, width)
        for path, module in self.named_modules():
            if isinstance(module, BatchNorm):
                module.layer, _, module.name = path.partition(".")

    def forward(self, pixels: torch.Tensor, taps: Taps | None = None, key: torch.Tensor | None = None) -> Classified:
        """Classify (B, channels, I, I), values from 0 to 1. Nothing is drawn, so that `key` makes no difference.

        Raises:
            TorchstoneError: pixels of another shape.
        """
        if pixels.shape[1:] != self.shape:
            raise TorchstoneError(
                f"model {self.spec.kind}: takes images of {self.shape[0]} x {self.shape[1]} x {self.shape[2]}, "
                f"got {' x '.join(map(str, pixels.shape[1:]))}"
            )
        x, passing = pixels.to(self.head.weight.dtype), Passing(taps)
        if self.spec.mean is not None:
            x = x - x.new_tensor(self.spec.mean)[:, None, None]
        if self.spec.std is not None:
            x = x / x.new_tensor(self.spec.std)[:, None, None]
        features_BD = passing.tap("features", self.backbone(x, passing))
        logits_BC = passing.tap("logits", self.head(features_BD))
        auxiliary_B = None
        if self.rejection is not None:
            auxiliary_B = passing.tap("auxiliary", torch.sigmoid(self.rejection(features_BD, passing)))
        return Classified(logits_BC, features_BD, auxiliary_B, passing.aux)


class AuxiliaryHead(nn.Module):
    """(B, D) -> (B,), before the sigmoid: linear(phi) + MLP(phi), MLP = D -> D/2, norm, ReLU, D/2 -> 1."""

    def __init__(self, spec: RejectionSpec, width: int) -> None:
        super().__init__()
        hidden = max(1, width // 2)
        self.linear = dense(width, 1, "head") if spec.form == "linear_mlp" else None
        self.up = dense(width, hidden, "up")
        self.norm = BatchNorm(hidden) if spec.norm == "batch" else None
        self.down = dense(hidden, 1, "head")

    def forward(self, features_BD: torch.Tensor, passing: Passing) -> torch.Tensor:
        h = self.up(features_BD)
        h = h if self.norm is None else self.norm(h, passing)
        out_B1 = self.down(torch.relu(h))
        if self.linear is not None:
            out_B1 = out_B1 + self.linear(features_BD)
        return out_B1[:, 0]


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy 2015, arXiv 1502.03167) of (B, K, ...) over all axes but K.

    See the module's docstring for what its running statistics are; they move by a tenth a step, as in torch.
    """

    momentum, eps = 0.1, 1e-5

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.register_buffer("running_mean", torch.empty(width))
        self.register_buffer("running_var", torch.empty(width))
        self.layer, self.name = "", ""

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        parameter.fill_(1.0 if name == "weight" else 0.0)

    def initialise_buffers(self) -> None:
        self.running_mean.zero_()  # type: ignore[operator]
        self.running_var.fill_(1.0)  # type: ignore[operator]

    def forward(self, x_BK: torch.Tensor, passing: Passing) -> torch.Tensor:
        if not self.training:
            return F.batch_norm(x_BK, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)  # type: ignore[arg-type]
        count = x_BK.numel() // x_BK.shape[1]
        if count < 2:
            raise TorchstoneError("batch normalisation needs two examples or more in a micro-batch; set trainer.batch")
        passing.aux[f"{self.layer}:{self.name}"] = self._sums(x_BK, count)
        return F.batch_norm(x_BK, None, None, self.weight, self.bias, training=True, eps=self.eps)

    @staticmethod
    @torch.no_grad()
    def _sums(x_BK: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """How many values a channel has, their sums and those of their squares, (1 + 2 K,)."""
        axes = [axis for axis in range(x_BK.dim()) if axis != 1]
        var_K, mean_K = torch.var_mean(x_BK.float() if x_BK.itemsize < 4 else x_BK, axes, correction=0)
        if x_BK.device.type != "mps":  # which has no float64; elsewhere squares must not swallow the variance
            var_K, mean_K = var_K.double(), mean_K.double()
        sums = torch.cat([mean_K.new_ones(1), mean_K, var_K + mean_K * mean_K]) * count
        return sums, mean_K.new_ones(())

    def after_step(self, step: int, sums: Mapping[str, torch.Tensor]) -> None:
        """Move the running statistics by those of a step."""
        if self.name not in sums:
            return
        count, total, squares = sums[self.name].split([1, len(self.weight), len(self.weight)])
        mean = total / count
        var = (squares / count - mean * mean).clamp(min=0) * count / (count - 1)
        with torch.no_grad():
            for kept, new in ((self.running_mean, mean), (self.running_var, var)):
                kept.lerp_(new.to(kept.dtype), self.momentum)  # type: ignore[operator]


def he(tensor: torch.Tensor, role: str, generator: torch.Generator) -> None:
    """First values (He et al. 2015, arXiv 1502.01852): normal, variance 2 / inputs, a head's 1 / inputs."""
    fan_in = tensor[0].numel()
    tensor.normal_(0, ((1 if role == "head" else 2) / fan_in) ** 0.5, generator=generator)


def dense(d_in: int, out: int, role: Literal["up", "head"]) -> Linear:
    """A linear map with a bias."""
    return Linear(d_in, (out,), (role,), True, resolve("linear", "dense")(), he)  # type: ignore[arg-type]
