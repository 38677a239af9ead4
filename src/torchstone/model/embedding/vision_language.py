"""Pictures and texts in one sequence (BEiT-3, Wang et al. 2022, arXiv 2208.10442, section 2.1, as TorchScale, arXiv
2211.13184, has it): a class token and patches, then token ids, each side with a table of positions of its own.

    x = [class; patches W + b] + P_vision,  ids E + P_text        modality 0, modality 1

Patches that are masked have one learned vector in their place. With `stack: multiway` tokens of both sides go through
parameters of their own and meet in attention. Give the model `position: none`: the two tables are part of this.

Shapes: B rows, C channels, I image side, P patch side, N = (I / P)^2 patches, L ids, T = 1 + N + L tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.model.context import Context
from torchstone.model.embedding import Embedding, EmbeddingSpec
from torchstone.model.embedding.patch import cut
from torchstone.model.site import Site
from torchstone.model.tokens import Tokens

__all__ = ["VisionLanguage", "VisionLanguageEmbedding", "VisionLanguageSpec"]


@dataclass(frozen=True)
class VisionLanguage:
    """What the embedding takes: pictures, texts, or a picture and a text in each row.

    Attributes:
        pixels: (B, C, I, I).
        ids: (B, L) token ids.
        masked: (B, N), True where a patch is hidden.
        valid: (B, L), False for padding among the ids.
    """

    pixels: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    masked: torch.Tensor | None = None
    valid: torch.Tensor | None = None


class VisionLanguageSpec(EmbeddingSpec):
    """Pictures in patches and token ids, in one sequence, each with positions of their own."""

    kind: ClassVar[str] = "vision_language"
    paper: ClassVar[str] = "Wang et al. 2022, arXiv 2208.10442"

    image: int = Field(224, ge=1)
    """Side of the image in pixels, a multiple of `patch`."""
    patch: int = Field(16, ge=1)
    """Side of a patch in pixels."""
    channels: int = Field(3, ge=1)
    """Colour channels."""
    positions: int = Field(1024, ge=1)
    """Positions of a text."""
    scale: bool = False
    """Multiply vectors by the square root of the width before positions are added."""

    @model_validator(mode="after")
    def _whole(self) -> VisionLanguageSpec:
        if self.image % self.patch:
            raise ValueError(f"patch: {self.patch} does not divide an image of {self.image} pixels")
        return self

    @property
    def patches(self) -> int:
        """N, of one picture."""
        return (self.image // self.patch) ** 2

    def build(self, site: Site, vocabulary: int | None) -> Embedding:
        assert vocabulary is not None
        return VisionLanguageEmbedding(self, site, vocabulary)


class VisionLanguageEmbedding(Embedding):
    """`VisionLanguage`, or ids (B, L) or pixels alone -> (B, T, D)."""

    def __init__(self, spec: VisionLanguageSpec, site: Site, vocabulary: int) -> None:
        super().__init__()
        self.spec, self.dropout, self.init = spec, site.dropout, site.init
        D = site.width
        self.factor = D**0.5 if spec.scale else 1.0
        self.weight = nn.Parameter(torch.empty(vocabulary, D))
        self.project = site.linear(spec.channels * spec.patch**2, D, "embed", bias=True)
        self.class_token = nn.Parameter(torch.empty(D))
        self.mask_token = nn.Parameter(torch.empty(D))
        self.vision_positions = nn.Parameter(torch.empty(1 + spec.patches, D))
        self.text_positions = nn.Parameter(torch.empty(spec.positions, D))

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        self.init(parameter, "position" if name.endswith("positions") else "embed", generator)

    def table(self) -> torch.Tensor:
        return self.weight

    def _parts(self, inputs: Any) -> VisionLanguage:
        """The inputs by name.

        Raises:
            TorchstoneError: they are of another shape or type, do not belong together, or a text is too long.
        """
        spec = self.spec
        if isinstance(inputs, Tokens):
            inputs = VisionLanguage(ids=inputs.ids, valid=inputs.valid)
        elif isinstance(inputs, torch.Tensor):
            inputs = VisionLanguage(ids=inputs) if inputs.dim() == 2 else VisionLanguage(pixels=inputs)
        if not isinstance(inputs, VisionLanguage) or (inputs.pixels is None and inputs.ids is None):
            raise TorchstoneError(
                f"the model takes VisionLanguage(pixels, ids), or one of them, not {type(inputs).__name__}"
            )
        wanted = (spec.channels, spec.image, spec.image)
        if inputs.pixels is not None and tuple(inputs.pixels.shape[1:]) != wanted:
            raise TorchstoneError(
                f"the model takes pixels of shape (rows, {', '.join(map(str, wanted))}), not "
                f"{tuple(inputs.pixels.shape)}"
            )
        if inputs.ids is not None and inputs.ids.dim() != 2:
            raise TorchstoneError(f"the model takes ids of shape (rows, length), not {tuple(inputs.ids.shape)}")
        rows = {len(x) for x in (inputs.pixels, inputs.ids) if x is not None}
        for name, x, size in (("masked", inputs.masked, spec.patches), ("valid", inputs.valid, None)):
            beside = inputs.pixels if name == "masked" else inputs.ids
            if x is None:
                continue
            if beside is None:
                raise TorchstoneError(
                    f"{name}: goes with {'pixels' if name == 'masked' else 'ids'}, and there are none"
                )
            size = beside.shape[1] if size is None else size
            if x.shape[-1] != size or len(x) not in (1, *rows):
                raise TorchstoneError(f"{name}: needs shape (rows, {size}), not {tuple(x.shape)}")
        if inputs.pixels is not None and inputs.ids is not None and len(rows) > 1:
            raise TorchstoneError(f"{len(inputs.pixels)} pictures and {len(inputs.ids)} texts do not make pairs")
        if inputs.ids is not None and inputs.ids.shape[1] > spec.positions:
            raise TorchstoneError(f"a text of {inputs.ids.shape[1]} tokens: embedding.positions is {spec.positions}")
        return inputs

    def tokens(self, inputs: Any) -> Tokens:
        parts = self._parts(inputs)
        if parts.pixels is None:
            assert parts.ids is not None
            length, device = parts.ids.shape[1], parts.ids.device
            told = inputs._columns() if isinstance(inputs, Tokens) else {"ids": parts.ids}
            if told.get("valid") is None and parts.valid is not None:
                told["valid"] = parts.valid
            told.setdefault("modality", torch.ones(1, length, dtype=torch.int64, device=device))
            return Tokens.blank(length, device, **told)
        n, L = 1 + self.spec.patches, 0 if parts.ids is None else parts.ids.shape[1]
        device = parts.pixels.device
        modality_1T = (torch.arange(n + L, device=device) >= n).long()[None]
        valid_BT = None
        if parts.valid is not None:
            seen_Bn = torch.ones(len(parts.valid), n, dtype=torch.bool, device=device)
            valid_BT = torch.cat([seen_Bn, parts.valid.bool()], 1)
        return Tokens.blank(n + L, device, modality=modality_1T, valid=valid_BT)

    def forward(
        self,
        inputs: Any,
        tokens: Tokens,
        added: torch.Tensor | None,
        ctx: Context,
        embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        parts = self._parts(inputs)
        if parts.pixels is not None and ctx.mask.causal:
            raise TorchstoneError("embedding vision_language: a decoder reads texts; pictures go into an encoder")
        x_BTD = torch.cat(self._vectors(parts), 1) * self.factor if embeddings is None else embeddings
        x_BTD = x_BTD + torch.cat(self._places(parts, tokens), 1).to(x_BTD.dtype)
        if added is not None:
            x_BTD = x_BTD + added.to(x_BTD.dtype)
        return ctx.drop(ctx.tap("embedding", x_BTD), self.dropout, "embedding")

    def _vectors(self, parts: VisionLanguage) -> list[torch.Tensor]:
        found = []
        if parts.pixels is not None:
            x_BND = self.project(cut(parts.pixels, self.spec.patch))
            if parts.masked is not None:
                x_BND = torch.where(parts.masked.bool()[..., None], self.mask_token.to(x_BND.dtype), x_BND)
            found += [self.class_token.to(x_BND.dtype).expand(len(x_BND), 1, -1), x_BND]
        if parts.ids is not None:
            found.append(F.embedding(parts.ids, self.weight))
        return found

    def _places(self, parts: VisionLanguage, tokens: Tokens) -> list[torch.Tensor]:
        """Vectors of positions, (B|1, ., D) each. Padding among the ids does not count."""
        found = [] if parts.pixels is None else [self.vision_positions[None]]
        if parts.ids is None:
            return found
        if parts.pixels is None:
            where_BL = tokens.where
        elif parts.valid is None:
            where_BL = torch.arange(parts.ids.shape[1], device=parts.ids.device)[None]
        else:
            where_BL = (parts.valid.long().cumsum(1) - 1).clamp(min=0)
        known = len(self.text_positions)
        if where_BL.device.type == "cpu" and not torch.compiler.is_compiling() and int(where_BL.max()) >= known:
            raise TorchstoneError(f"position {int(where_BL.max())} of a text: embedding.positions is {known}")
        places_BLD = F.embedding(where_BL, self.text_positions)
        if found and len(places_BLD) > 1:  # rows differ by their padding
            found = [found[0].expand(len(places_BLD), -1, -1)]
        return [*found, places_BLD]
