"""Masked image modelling (BEiT, Bao et al. 2022, arXiv 2106.08254): predict visual tokens of patches that were hidden.

    L = - mean over hidden patches i of  log softmax(W h_i + b)[z_i],    z = tokenizer(second view)

The encoder sees patches of one view, of which the hidden ones are one learned vector; a frozen tokenizer sees the other
view, and its grid of codes must be the encoder's grid of patches. With `target: pixels` the head gives the pixels of a
hidden patch in the place of scores of codes, by mean squared error: the paper's ablation.

B pictures, N patches, P numbers of a patch's pixels, V codes.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.embedding.patch import PatchEmbedding, Patches, cut
from torchstone.model.transformer import Transformer
from torchstone.objectives import Batch, Facts, Objective, ObjectiveSpec, Result, Term
from torchstone.objectives._frozen import WithReference
from torchstone.ops import at_least_float32
from torchstone.ops.cross_entropy import linear_cross_entropy
from torchstone.vision.masking import MaskSpec
from torchstone.vision.tokenizers import load_tokenizer
from torchstone.vision.views import ViewsSpec

__all__ = ["MaskedImage", "MaskedImageSpec", "MaskedPixels"]


class MaskedImageSpec(ObjectiveSpec):
    """Predict what was hidden of a picture: its visual tokens, or its pixels."""

    example: ClassVar[str | None] = "images"
    paper: ClassVar[str] = "Bao et al. 2022, arXiv 2106.08254"

    target: Literal["tokens", "pixels"] = "tokens"
    """What is predicted of a hidden patch: its code, or its pixels."""
    tokenizer: str | None = Field(None, min_length=1)
    """What gives codes: a run of a discrete VAE, or a file of k-means."""
    view: int | None = Field(None, ge=1, le=2**14)
    """Pixels of a side of the tokenizer's view; null takes as many as make a code of each patch."""
    mask: MaskSpec = MaskSpec()
    """Which patches are hidden."""
    views: ViewsSpec = ViewsSpec()
    """How pictures vary from epoch to epoch."""

    @model_validator(mode="after")
    def _of_target(self) -> MaskedImageSpec:
        if self.target == "tokens" and self.tokenizer is None:
            raise ValueError("tokenizer: target tokens needs one, the run of a discrete VAE or a file of k-means")
        if self.target == "pixels" and (self.tokenizer is not None or self.view is not None):
            raise ValueError("tokenizer: target pixels takes none, and no view for it")
        return self

    def build(self, facts: Facts) -> Objective:
        if self.target == "pixels":
            return MaskedPixels(self, facts)
        assert self.tokenizer is not None
        if facts.load is None:
            raise TorchstoneError("objective masked_image: needs a tokenizer, and no run can be loaded here")
        return MaskedImage(self, facts, load_tokenizer(self.tokenizer, facts.load))


class _Masked:
    """What both targets share: masks and the encoder's view."""

    spec: MaskedImageSpec
    grid: Any
    """Spec of the embedding that cuts pictures into patches."""

    def _check(self, model: nn.Module) -> None:
        """Refuse what is no encoder of pictures whose patches can be hidden.

        Raises:
            TorchstoneError: says what the model lacks.
        """
        embedding = getattr(model, "embedding", None)
        if not isinstance(model, Transformer) or not isinstance(embedding, PatchEmbedding):
            raise TorchstoneError(
                "objective masked_image: needs a transformer over patches; set model.embedding: patch"
            )
        if model.encoder is None or model.decoder is not None:
            raise TorchstoneError("objective masked_image: needs an encoder; set model.causal: false")
        if not embedding.spec.mask_token:
            raise TorchstoneError("objective masked_image: needs a vector for hidden patches; set embedding.mask_token")
        if why := self.spec.mask.illegal(embedding.spec.side):
            raise TorchstoneError(f"objective masked_image: {why}")

    def masks(self, batch: Batch, key: Key) -> torch.Tensor:
        """Hidden patches (B, N)."""
        masked_BSS = self.spec.mask.draw(len(batch["pixels"]), self.grid.side, key.fold("mask"))
        return masked_BSS.flatten(1).to(batch["pixels"].device)

    def hidden(self, model: nn.Module, batch: Batch, key: Key | None) -> tuple[torch.Tensor, Any]:
        """The encoder's states of all patches (B, N, D), and what it gave."""
        drop = None if key is None else key.tensor(batch["pixels"].device)
        out = model(Patches(batch["pixels"], batch["masked"]), outputs="none", key=drop)
        return out.hidden[:, -batch["masked"].shape[1] :], out


def _grid(facts: Facts) -> Any:
    embedding = getattr(facts.model, "embedding", None)
    if getattr(embedding, "kind", None) != "patch":
        raise TorchstoneError("objective masked_image: needs a transformer over patches; set model.embedding: patch")
    return embedding


class MaskedImage(_Masked, WithReference):
    """Batch: pixels (B, C, I, I). `prepare` makes the encoder's view of them, and adds `masked` (B, N) and `targets`
    (B, N), codes of hidden patches, -100 elsewhere."""

    def __init__(self, spec: MaskedImageSpec, facts: Facts, tokenizer: nn.Module) -> None:
        WithReference.__init__(self, spec.kind, tokenizer, str(spec.tokenizer), "tokenizer")
        self.spec, self.grid = spec, _grid(facts)

    def check(self, model: nn.Module) -> None:
        WithReference.check(self, model)
        self._check(model)
        tokenizer: Any = self.reference
        side, view = self.grid.side, self.view
        if view % tokenizer.stride or view // tokenizer.stride != side:
            tokens = view // tokenizer.stride
            raise TorchstoneError(
                f"objective masked_image: the tokenizer yields {tokens}x{tokens} tokens, the encoder {side}x{side} "
                "patches"
            )
        if tokenizer.channels != self.grid.channels:
            raise TorchstoneError(
                f"objective masked_image: the tokenizer takes pictures of {tokenizer.channels} channels, the encoder "
                f"of {self.grid.channels}"
            )
        model.vocabulary_head()  # type: ignore[operator]
        if model.spec.vocabulary != tokenizer.codes:  # type: ignore[union-attr]
            raise TorchstoneError(
                f"objective masked_image: the tokenizer has {tokenizer.codes:,} codes, and model.vocabulary is "
                f"{model.spec.vocabulary:,}"  # type: ignore[union-attr]
            )

    @property
    def view(self) -> int:
        """Pixels of a side of the tokenizer's view."""
        tokenizer: Any = self.reference
        return self.spec.view or self.grid.side * tokenizer.stride

    @torch.no_grad()
    def visual_tokens(self, view_BCJJ: torch.Tensor) -> torch.Tensor:
        """Visual tokens (B, N) of the tokenizer's view."""
        return self.reference.tokens(view_BCJJ).flatten(1)  # type: ignore[union-attr, operator]

    def prepare(self, batch: Batch, key: Key) -> Batch:
        drawn = key.fold("views") if self.training else None
        pixels, second = self.spec.views.draw(batch["pixels"], (self.grid.image, self.view), drawn)
        codes_BN, masked_BN = self.visual_tokens(second), self.masks(batch, key)
        return {
            **batch,
            "pixels": pixels,
            "masked": masked_BN,
            "targets": torch.where(masked_BN, codes_BN, -100),
        }

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"targets": (batch["targets"] >= 0).sum(), "tokens": torch.tensor(batch["masked"].numel())}

    def forward(self, model: nn.Module, batch: Batch, key: Key | None) -> Result:
        return self._result(model, batch, key, False)

    def evaluate(self, model: nn.Module, batch: Batch, predict: bool = False) -> Result:
        return self._result(model, batch, None, True)

    def _result(self, model: nn.Module, batch: Batch, key: Key | None, score: bool) -> Result:
        hidden_BND, out = self.hidden(model, batch, key)
        chosen = batch["targets"] >= 0
        product = model.vocabulary_head().product(hidden_BND[chosen], None)  # type: ignore[operator]
        code_M = batch["targets"][chosen]
        nll = linear_cross_entropy(product.h, product.weight, code_M, bias_V=product.bias, softcap=product.softcap)
        found = Result.of({"loss": Term(nll)}, out.aux)
        if not score:
            return found
        right = (product.logits().argmax(-1) == code_M).sum()
        return Result(found.terms, found.metrics, scores={"accuracy": (right, chosen.sum())})


class MaskedPixels(_Masked, Objective):
    """Batch: pixels (B, C, I, I). `prepare` makes the encoder's view of them, and adds `masked` (B, N)."""

    def __init__(self, spec: MaskedImageSpec, facts: Facts) -> None:
        Objective.__init__(self)
        self.spec, self.grid = spec, _grid(facts)

    def check(self, model: nn.Module) -> None:
        self._check(model)
        numbers = self.grid.channels * self.grid.patch**2
        head: Any = model.spec.head  # type: ignore[union-attr]
        if head.kind != "token_classification" or head.classes != numbers:
            raise TorchstoneError(
                f"objective masked_image: pixels of a patch are {numbers} numbers; set model.head: "
                f"{{kind: token_classification, classes: {numbers}}}"
            )

    def prepare(self, batch: Batch, key: Key) -> Batch:
        (pixels,) = self.spec.views.draw(
            batch["pixels"], (self.grid.image,), key.fold("views") if self.training else None
        )
        return {**batch, "pixels": pixels, "masked": self.masks(batch, key)}

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"targets": batch["masked"].sum(), "tokens": torch.tensor(batch["masked"].numel())}

    def forward(self, model: nn.Module, batch: Batch, key: Key | None) -> Result:
        hidden_BND, out = self.hidden(model, batch, key)
        wanted_MP = cut(batch["pixels"], self.grid.patch)[batch["masked"]]
        made_MP = at_least_float32(model.head(hidden_BND[batch["masked"]], None, None))  # type: ignore[operator]
        return Result.of({"loss": Term((made_MP - wanted_MP).square().mean(-1).sum())}, out.aux)
