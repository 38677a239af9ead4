"""The catalogue of parts, as data."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from torchstone import recipe as _recipe  # noqa: F401 (families whose roots it holds)
from torchstone.spec import FAMILIES, PartSpec, Spec, kinds, part_family, resolve

__all__ = ["catalogue"]


def catalogue(family: str | None = None) -> list[dict[str, Any]]:
    """An entry a kind: family, kind, summary, paper, fields (type, default, bounds, description), and what it declares.

    Raises:
        TorchstoneError: there is no such family.
    """
    families = [family] if family is not None else sorted(FAMILIES)
    return [_entry(resolve(name, kind)) for name in families for kind in kinds(name)]


def _entry(cls: type[PartSpec]) -> dict[str, Any]:
    declares = {
        name: _plain(getattr(cls, name))
        for name in ("consumes", "can_give", "takes", "masks", "causal_only", "gives", "scope", "exact", "owns_norm")
        if not isinstance(getattr(cls, name, property()), property)  # a property depends on the fields
    }
    return {
        "family": cls.family,
        "kind": cls.kind,
        "summary": cls.summary(),
        "paper": cls.paper,
        "fields": {name: _field(info) for name, info in cls.model_fields.items()},
        "declares": declares,
    }


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, frozenset) else value


def _field(info: FieldInfo) -> dict[str, Any]:
    family = part_family(info)
    default = info.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        default = "required"
    elif isinstance(default, PartSpec):
        default = default.kind
    elif isinstance(default, Spec):
        default = default.dump()
    signs = {
        "ge": ">=",
        "gt": ">",
        "le": "<=",
        "lt": "<",
        "multiple_of": "multiple of",
        "min_length": "length >=",
        "pattern": "matches",
    }
    bounds = [
        f"{sign} {getattr(limit, name)}"
        for limit in info.metadata
        for name, sign in signs.items()
        if getattr(limit, name, None) is not None
    ]
    return {
        "type": f"part of {family}" if family else _type(info.annotation),
        "default": default,
        "bounds": " and ".join(bounds),
        "description": " ".join((info.description or "").split()),
    }


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(argument) for argument in get_args(annotation))
    if origin is Annotated:
        return _type(get_args(annotation)[0])
    if origin is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if annotation is type(None):
        return "null"
    if origin is not None:
        inner = ", ".join("..." if argument is ... else _type(argument) for argument in get_args(annotation))
        return f"{origin.__name__}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))
