"""Token embeddings: a vector per id, with the options that published models use.

Vectors may be of a size of their own and then projected to the width: the factorised embedding of ALBERT (Lan et al.
2019, arXiv 1909.11942, section 3.1), with ELECTRA's bias and with positions, types and norm before the projection.

Shapes: B rows, T tokens, D width, E size of the vectors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.model.context import Context
from torchstone.model.embedding import Embedding, EmbeddingSpec
from torchstone.model.linear import Linear
from torchstone.model.norm import NormSpec
from torchstone.model.site import Initialise, Site
from torchstone.model.tokens import Tokens
from torchstone.spec import Part, resolve

__all__ = ["TokenEmbedding", "TokenSpec"]


class TokenSpec(EmbeddingSpec):
    """A learned vector per token id, with optional token types, scale and norm."""

    size: int | None = Field(None, ge=1)
    """Size of the vectors, projected to the width where it differs (ALBERT, ELECTRA); None takes the model's width."""
    types: int = Field(0, ge=0)
    """Number of token types (BERT's segments); 0 has none."""
    scale: bool = False
    """Multiply vectors by the square root of their size (Vaswani et al. 2017, section 3.4)."""
    norm: Part[NormSpec] | None = None
    """A norm after everything is added (BERT, BLOOM)."""

    def table_width(self, width: int) -> int:
        return self.size or width

    def build(self, site: Site, vocabulary: int | None) -> Embedding:
        assert vocabulary is not None
        return TokenEmbedding(self, site, vocabulary)


class TokenEmbedding(Embedding):
    """ids (B, T) -> (B, T, D)."""

    def __init__(self, spec: TokenSpec, site: Site, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.dropout, self.init = vocabulary, site.dropout, site.init
        E = spec.table_width(site.width)
        self.factor = E**0.5 if spec.scale else 1.0
        self.weight = nn.Parameter(torch.empty(vocabulary, E))
        self.types = _Types(spec.types, E, site.init) if spec.types else None
        self.norm = spec.norm.build(E) if spec.norm is not None else None
        dense = resolve("linear", "dense")()
        self.project = Linear(E, (site.width,), ("up",), True, dense, site.init) if site.width != E else None  # type: ignore[arg-type]

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        self.init(parameter, "embed", generator)

    def table(self) -> torch.Tensor:
        return self.weight

    def tokens(self, inputs: Any) -> Tokens:
        tokens = Tokens.of(inputs) if isinstance(inputs, torch.Tensor) and inputs.dim() == 2 else inputs
        if not isinstance(tokens, Tokens):
            got = tuple(inputs.shape) if isinstance(inputs, torch.Tensor) else type(inputs).__name__
            raise TorchstoneError(f"the model takes token ids of shape (rows, length), not {got}")
        if tokens.index is None:
            column = next(value for value in (tokens.ids, tokens.valid) if value is not None)
            tokens = Tokens.blank(column.shape[1], column.device, **tokens._columns())
        return tokens

    def forward(
        self,
        inputs: Any,
        tokens: Tokens,
        added: torch.Tensor | None,
        ctx: Context,
        embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if embeddings is None:
            assert tokens.ids is not None
            x_BTE = F.embedding(tokens.ids, self.weight)
            if self.factor != 1.0:
                x_BTE = x_BTE * self.factor
        else:
            x_BTE = embeddings
        if added is not None:
            x_BTE = x_BTE + added.to(x_BTE.dtype)
        if self.types is not None:
            segment = torch.zeros_like(tokens.index) if tokens.segment is None else tokens.segment
            x_BTE = x_BTE + self.types(segment)
        if self.norm is not None:
            x_BTE = self.norm(x_BTE)
        if self.project is not None:
            return ctx.tap("embedding", self.project(ctx.drop(x_BTE, self.dropout, "embedding")))
        return ctx.drop(ctx.tap("embedding", x_BTE), self.dropout, "embedding")


class _Types(nn.Module):
    """A vector per token type."""

    def __init__(self, types: int, width: int, init: Initialise) -> None:
        super().__init__()
        self.init = init
        self.weight = nn.Parameter(torch.empty(types, width))

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        self.init(parameter, "embed", generator)

    def forward(self, segment_BT: torch.Tensor) -> torch.Tensor:
        return F.embedding(segment_BT, self.weight)
