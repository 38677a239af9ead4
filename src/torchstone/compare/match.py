"""Matching: variants that differ in size made equal, by the feed-forward width alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from torchstone.compare.variants import Variant
from torchstone.errors import TorchstoneError
from torchstone.model.measure import measure
from torchstone.recipe import Recipe
from torchstone.train.run import shape_of

__all__ = ["Match", "inner_parameters", "match", "size_of"]

Match = Literal["none", "parameters", "flops", "wall"]

_WIDEST = 1 << 20


def inner_parameters(model: nn.Module) -> int:
    """Parameters without the embedding, the tables of positions and the head."""
    outer = ("embedding.", "head.")
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not name.startswith(outer) and ".positions." not in name
    )


def size_of(recipe: Recipe, by: Match) -> float:
    """What is matched: parameters, or operations of a training token, forward and backward."""
    model = shape_of(recipe.model)
    if by == "parameters":
        return inner_parameters(model)
    return measure(model, getattr(recipe.data, "block", 1024)).flops_per_token


def match(variants: list[Variant], by: Match, tolerance: float = 0.01) -> list[Variant]:
    """The variants with the feed-forward width of each set so that it is of the size of the first.

    Raises:
        TorchstoneError: the recipe has no one feed-forward width, an axis is that width, or no width comes within
            `tolerance`.
    """
    reference = size_of(variants[0].recipe, by)
    return [variants[0], *(_matched(variant, by, reference, tolerance) for variant in variants[1:])]


def _matched(variant: Variant, by: Match, wanted: float, tolerance: float) -> Variant:
    model: Any = variant.recipe.model
    ffn = getattr(model, "ffn", None)
    if ffn is None or "hidden" not in type(ffn).model_fields:
        raise TorchstoneError(f"variant {variant.name}: has no model.ffn.hidden to match {by} with")
    if any(text.startswith(("model.ffn.hidden", "model.ffn=")) or ".ffn.hidden" in text for text in variant.patch):
        raise TorchstoneError(f"variant {variant.name}: --match {by} sets model.ffn.hidden, which is an axis here")

    def at(hidden: int) -> Recipe:
        return variant.recipe.override({"model": {"ffn": {"hidden": hidden}}})

    hidden = _nearest(lambda hidden: size_of(at(hidden), by), wanted)
    found = size_of(at(hidden), by)
    off = found / wanted - 1
    if abs(off) > tolerance:
        raise TorchstoneError(
            f"variant {variant.name}: the nearest model.ffn.hidden, {hidden}, leaves {by} {100 * off:+.1f} % off "
            f"({found:,.0f} against {wanted:,.0f}); --match-tolerance {abs(off):.3f} would allow it"
        )
    note = f"--match {by}: model.ffn.hidden {hidden} ({100 * off:+.2f} %)"
    return replace(variant, recipe=at(hidden), notes=(*variant.notes, note))


def _nearest(size: Callable[[int], float], wanted: float) -> int:
    """The whole number from 1 on whose size is nearest, for a size that grows."""
    low, high = 1, 2
    while size(high) < wanted and high < _WIDEST:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) < wanted else (low, middle)
    return min((low, high), key=lambda hidden: abs(size(hidden) - wanted))
