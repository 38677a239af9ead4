"""Small models with logits far enough apart that float32 rounding decides nothing."""

from __future__ import annotations

from typing import Any

import torch

from torchstone.model.mask import Mask
from torchstone.model.site import initialise
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.spec import validate

VOCABULARY = 61


def build(**fields: Any) -> Transformer:
    """A two-layer model of width 32."""
    base = {
        "width": 32,
        "depth": 2,
        "vocabulary": VOCABULARY,
        "context": 64,
        "attention": {"kind": "softmax", "heads": 4},
        "residual": {"kind": "pre", "std": 0.3},
    }
    model = validate(TransformerSpec, {**base, **fields}).build()
    assert isinstance(model, Transformer)
    initialise(model, 0)
    return model


def ids(*lengths: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[list[int]]:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def recomputed(
    model: Transformer, prompt: list[int], new: int, memory: list[int] | None = None, mask: Mask | None = None
) -> list[int]:
    """Greedy decoding without a cache: the whole text through the model for every token."""
    text, extra = list(prompt), {} if memory is None else {"memory": torch.tensor([memory])}
    for _ in range(new):
        logits = model(torch.tensor([text]), outputs="last", mask=mask, **extra).logits
        text.append(int(logits[0, -1].argmax()))
    return text[len(prompt) :]
