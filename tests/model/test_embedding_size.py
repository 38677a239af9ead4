"""Vectors of a size of their own: what goes with them, and what is refused in a sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchstone.errors import TorchstoneError
from torchstone.model.site import initialise
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.spec import validate

FIELDS: dict[str, Any] = {"width": 8, "depth": 1, "vocabulary": 11, "context": 6, "attention": {"heads": 2}}


def model(**fields: Any) -> Transformer:
    spec = validate(TransformerSpec, {**FIELDS, "position": "learned", **fields})
    return initialise(spec.build(), 0).eval()  # type: ignore[return-value]


def test_positions_and_types_have_the_size_of_the_vectors_and_no_size_has_no_projection() -> None:
    sized = model(causal=False, embedding={"size": 5, "types": 2, "norm": "layernorm"}, head="mlm")
    shapes = {name: tuple(parameter.shape) for name, parameter in sized.named_parameters()}
    assert shapes["embedding.weight"] == (11, 5) and shapes["encoder.positions.learned.weight"] == (6, 5)
    assert shapes["embedding.types.weight"] == (2, 5) and shapes["embedding.project.weight"] == (8, 5)
    assert shapes["head.transform.weight"] == (5, 8)
    for plain in (model(), model(embedding={"size": 8})):
        assert not any("project" in name for name, _ in plain.named_parameters())


def test_looked_up_vectors_can_be_given_in_their_size() -> None:
    sized, ids_BT = model(embedding={"size": 5}, head={"tied": False}), torch.tensor([[3, 1, 4, 1]])
    given = sized(ids_BT, embeddings=sized.embedding.weight[ids_BT])
    assert torch.equal(given.logits, sized(ids_BT).logits) and given.hidden.shape == (1, 4, 8)


def test_a_head_without_a_transform_cannot_be_tied_to_vectors_of_another_size() -> None:
    with pytest.raises(TorchstoneError) as caught:
        model(embedding={"size": 5})
    assert str(caught.value).endswith(
        "head.tied: head lm multiplies vectors of width 8, and those of the embedding's matrix have 5; untie it, or "
        "leave embedding.size out"
    )
