"""Variants: what a comparison compares, each a whole recipe."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchstone.data.hashing import digest
from torchstone.errors import TorchstoneError
from torchstone.recipe import Recipe, load_recipe, parse_override, parse_yaml
from torchstone.spec import Changes
from torchstone.train.run import RunFolder

__all__ = ["Source", "Variant", "from_axes", "from_file", "from_patch", "split_values"]

Source = str | Path | Mapping[str, Any] | Recipe
"""What a recipe can be given as."""


@dataclass(frozen=True)
class Variant:
    """One arm: a name, its recipe, and what changed on the way to it.

    Attributes:
        name: as the report calls it.
        recipe: whole; the seed in it is not used.
        patch: what distinguishes it, as overrides.
        notes: what a change of kind carried, dropped and defaulted; matching and tuning add theirs.
    """

    name: str
    recipe: Recipe
    patch: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """A file name for it, unique among names that differ."""
        plain = re.sub(r"[^A-Za-z0-9.=_-]+", "_", self.name).strip("_.")[:60] or "variant"
        return plain if plain == self.name else f"{plain}-{digest(self.name)[:6]}"


def split_values(text: str) -> list[str]:
    """The values of an axis: commas at the top level separate, those inside brackets and quotes do not."""
    values, depth, quote, current = [], 0, "", ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in ")}]":
            depth -= 1
        if character == "," and not depth and not quote:
            values.append(current)
            current = ""
        else:
            current += character
    return [value.strip() for value in [*values, current]]


def from_axes(source: Source, arguments: Iterable[str]) -> list[Variant]:
    """Every combination of the axes, the first values first; the first variant is the reference.

    Args:
        source: what all start from.
        arguments: ``field=a,b,c`` is an axis, ``field=a`` an override for all.

    Raises:
        TorchstoneError: no axis, a field or kind that does not exist, a combination that cannot be built.
    """
    axes: list[tuple[str, list[str]]] = []
    common: list[str] = []
    for argument in arguments:
        path, equals, text = argument.partition("=")
        if not equals:
            raise TorchstoneError(f"{argument!r}: an axis is field=value,value, an override field=value")
        values = split_values(text)
        if len(values) == 1:
            common.append(argument)
            continue
        if "" in values:
            raise TorchstoneError(f"{argument!r}: an empty value between commas")
        repeated = next((value for value in values if values.count(value) > 1), None)
        if repeated is not None:
            raise TorchstoneError(f"{argument!r}: {repeated} stands twice")
        axes.append((path.strip(), values))
    if not axes:
        raise TorchstoneError(
            "compare: no axis; give one field several values, as in model.attention.kind=softmax,other"
        )
    found = []
    for choice in itertools.product(*(values for _, values in axes)):
        patch = tuple(f"{path}={value}" for (path, _), value in zip(axes, choice, strict=True))
        name = (
            choice[0]
            if len(axes) == 1
            else ", ".join(
                f"{path.rpartition('.')[2] if path.rpartition('.')[2] != 'kind' else path.split('.')[-2]}={value}"
                for (path, _), value in zip(axes, choice, strict=True)
            )
        )
        found.append(_variant(name, source, common, patch))
    return found


def from_file(source: Source, path: str | Path, common: Sequence[str] = ()) -> list[Variant]:
    """Named variants: a YAML mapping from names to patches (nested fields, or a list of ``field=value``).

    Raises:
        TorchstoneError: unreadable, no mapping, fewer than two names, a variant that cannot be built.
    """
    try:
        body = parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise TorchstoneError(f"{path}: cannot be read ({error})") from None
    if not isinstance(body, Mapping) or len(body) < 2:
        raise TorchstoneError(f"{path}: needs a mapping of two or more names to fields")
    return [from_patch(str(name), source, patch, common) for name, patch in body.items()]


def from_patch(name: str, source: Source, patch: Any, common: Sequence[str] = ()) -> Variant:
    """The variant of a nested patch, of a list of ``field=value``, or of nothing."""
    if isinstance(patch, str):
        patch = [patch]
    if isinstance(patch, Mapping):
        shown = tuple(f"{field}={value}" for field, value in patch.items())
        return _variant(name, source, [*common, dict(patch)], (), shown)
    return _variant(name, source, common, tuple(patch or ()))


def _variant(
    name: str,
    source: Source,
    common: Sequence[str | Mapping[str, Any]],
    patch: Sequence[str],
    shown: tuple[str, ...] | None = None,
) -> Variant:
    body = source.dump() if isinstance(source, Recipe) else source
    changes = Changes()
    try:
        for override in patch:
            parse_override(override)
        loaded = load_recipe(body, [*common, *patch], changes, lambda run: RunFolder(run).start())
    except TorchstoneError as error:
        raise TorchstoneError(f"variant {name}: {error}") from None
    return Variant(name, loaded, tuple(patch) if shown is None else shown, tuple(changes.lines))
