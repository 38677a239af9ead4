"""Specs and the open registry of parts.

A *part* is a `PartSpec` and an `nn.Module` in one file. The spec is frozen data: documented, bounded fields and a
`build` method. Its *family* is what it can stand for (attention, norm, optimizer); its *kind* is the name of the file
that holds it. A field typed ``Part[AttentionSpec]`` accepts any kind of that family, known or not yet known to this
process: the kind is resolved by importing that one file, from the family's folder or from one of that name in a wing
(``domains/knowledge_graph/data``), then by entry points of the group ``torchstone.parts`` (named ``family.kind``).
Nothing central is edited to add a kind.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from torchstone.errors import TorchstoneError, nearest

__all__ = [
    "FAMILIES",
    "Changes",
    "Part",
    "PartSpec",
    "Spec",
    "family_root",
    "json_schema",
    "kinds",
    "lazy_parts",
    "merge",
    "part",
    "resolve",
    "sentence",
    "validate",
]

FAMILIES: dict[str, str] = {
    "attention": "torchstone.model.attention",
    "block": "torchstone.model.block",
    "adapt": "torchstone.adapt",
    "corpus": "torchstone.data.corpora",
    "data": "torchstone.data",
    "embedding": "torchstone.model.embedding",
    "ffn": "torchstone.model.feedforward",
    "head": "torchstone.model.head",
    "linear": "torchstone.model.linear",
    "model": "torchstone.model",
    "noise": "torchstone.generate.noise",
    "norm": "torchstone.model.norm",
    "objective": "torchstone.objectives",
    "optimizer": "torchstone.train.optimizers",
    "position": "torchstone.model.position",
    "residual": "torchstone.model.residual",
    "reward": "torchstone.rl.reward",
    "router": "torchstone.model.feedforward.router",
    "scaling": "torchstone.model.position.scaling",
    "schedule": "torchstone.train.schedules",
    "stack": "torchstone.model.stack",
    "tokenizer": "torchstone.data.tokenizers",
}
"""Family name -> the package that holds one file per kind."""
WINGS = ("adapt", "compress", "rl", "interpret", "trust", "domains", "vision")
"""Packages whose folders may hold kinds too, each in one named as the family's own."""

_ROOTS: dict[str, type[PartSpec]] = {}
_KINDS: dict[str, dict[str, type[PartSpec]]] = {}


SHORT = "*"
"""Key under which a patch keeps a part's bare word when another override sets one of its fields."""


class Spec(BaseModel):
    """Frozen, documented data. Unknown fields are refused; the docstring under a field is its description."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    def dump(self) -> dict[str, Any]:
        """Plain data (JSON types) from which `validate` builds an equal spec."""
        return self.model_dump(mode="json")


class PartSpec(Spec):
    """Root of all families. A family root sets `family`; a kind is a subclass in the file of that name.

    Fields declared on the family root (such as `heads`) survive a change of `kind`; all others start from the new
    kind's defaults.
    """

    family: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    offered: ClassVar[bool] = True
    """Whether messages and listings name the kind; stacks place kinds that nobody should ask for."""
    paper: ClassVar[str] = ""
    """Where the method comes from: authors, year, arXiv number."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if "family" in cls.__dict__:
            _ROOTS[cls.family] = cls
            _KINDS.setdefault(cls.family, {})
            return
        if "kind" not in cls.__dict__:
            module = cls.__module__.rpartition(".")
            if module[0] not in _homes(cls.family) or module[2].startswith("_"):
                return  # an abstract base, or a class outside the package that did not name its kind
            cls.kind = module[2]
        known = _KINDS[cls.family].get(cls.kind)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"{cls.family} kind {cls.kind!r} is defined twice: {known.__module__} and {cls.__module__}")
        _KINDS[cls.family][cls.kind] = cls

    @model_validator(mode="before")
    @classmethod
    def _without_kind(cls, value: Any) -> Any:
        """What `dump` wrote may come back, its kind included."""
        if isinstance(value, Mapping) and value.get("kind") == cls.kind and cls.kind:
            return {name: item for name, item in value.items() if name != "kind"}
        return value

    @model_serializer(mode="wrap")
    def _with_kind(self, handler: Any) -> dict[str, Any]:
        return {"kind": self.kind, **handler(self)} if self.kind else handler(self)

    @classmethod
    def short(cls, value: str) -> dict[str, Any]:
        """What a bare word in the place of a part stands for: its kind, unless a family knows better."""
        return {"kind": value}

    @classmethod
    def summary(cls) -> str:
        """The first line of the class docstring: one line of what the part is."""
        return (inspect.getdoc(cls) or "").split("\n", 1)[0]

    @classmethod
    def root_fields(cls) -> frozenset[str]:
        """Names of the fields that belong to the family and survive a change of kind."""
        return frozenset(_ROOTS[cls.family].model_fields)


class _Open:
    """Pydantic type behind `Part`: any kind of a family, resolved when a value is validated."""

    def __get_pydantic_core_schema__(self, source: type[PartSpec], handler: Any) -> CoreSchema:
        def check(value: Any) -> PartSpec:
            if isinstance(value, source):
                return value
            if isinstance(value, str):  # `norm: layernorm` is short for `norm: {kind: layernorm}`
                value = source.short(value)
            if not isinstance(value, Mapping):
                raise PydanticCustomError(
                    "part", "needs a kind or a mapping with 'kind', not {got}", {"got": repr(value)[:60]}
                )
            fields = dict(value)
            kind = fields.pop("kind", None)
            if kind is None:
                kind = getattr(source, "default_kind", None)
            if not isinstance(kind, str):
                raise PydanticCustomError(
                    "part", "needs a 'kind', one of: {allowed}", {"allowed": ", ".join(kinds(source.family))}
                )
            try:
                cls = resolve(source.family, kind)
            except TorchstoneError as error:
                raise PydanticCustomError("part", "{message}", {"message": str(error)}) from None
            return cls.model_validate(fields)

        return core_schema.no_info_plain_validator_function(
            check,
            serialization=core_schema.plain_serializer_function_ser_schema(lambda spec: spec.model_dump(mode="json")),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        return {}


_Family = TypeVar("_Family", bound=PartSpec)
Part = Annotated[_Family, _Open()]
"""``Part[AttentionSpec]``: a field that holds any kind of the family `AttentionSpec`."""


def part(kind: str, family: str, **fields: Any) -> Any:
    """Default of a part field: that kind with these fields, resolved only when needed."""
    return Field(default_factory=lambda: resolve(family, kind).model_validate(fields))


# ---------------------------------------------------------------------------------------------------- registry


def family_root(family: str) -> type[PartSpec]:
    """The root class of a family.

    Raises:
        TorchstoneError: there is no such family.
    """
    if family not in _ROOTS and family in FAMILIES:
        package = importlib.import_module(FAMILIES[family])
        for name in getattr(package, "__all__", ()):  # a package may import its root only when asked for it
            if family not in _ROOTS:
                getattr(package, name)
    if family not in _ROOTS:
        raise TorchstoneError(
            f"no family {family!r}{nearest(family, FAMILIES)}; families: {', '.join(sorted(FAMILIES))}"
        )
    return _ROOTS[family]


@functools.cache
def _entry_points(family: str) -> dict[str, importlib.metadata.EntryPoint]:
    points = importlib.metadata.entry_points(group="torchstone.parts")
    return {point.name.partition(".")[2]: point for point in points if point.name.startswith(f"{family}.")}


def _load_point(family: str, kind: str) -> None:
    point = _entry_points(family)[kind]
    try:
        point.load()
    except Exception as error:
        owner = point.dist.name if point.dist is not None else "an installed package"
        raise TorchstoneError(
            f"{family} kind {kind!r} of {owner} cannot be imported ({type(error).__name__}: {error})"
        ) from None


def resolve(family: str, kind: str) -> type[PartSpec]:
    """The spec class of `kind`: registered in this process, else its own file, else an entry point.

    Raises:
        TorchstoneError: nothing of that name; the message lists the kinds and the nearest one.
    """
    family_root(family)
    if kind in _KINDS[family]:
        return _KINDS[family][kind]
    if kind.isidentifier() and not kind.startswith("_"):
        here = (home for home in _homes(family) if importlib.util.find_spec(f"{home}.{kind}") is not None)
        if home := next(here, None):
            importlib.import_module(f"{home}.{kind}")
        elif kind in _entry_points(family):
            _load_point(family, kind)
    if kind not in _KINDS[family]:
        allowed = kinds(family)
        raise TorchstoneError(
            f"no {family} kind {kind!r}{nearest(kind, allowed)}; kinds: {', '.join(allowed) or 'none yet'}"
        )
    return _KINDS[family][kind]


@functools.cache
def _homes(family: str) -> tuple[str, ...]:
    """Packages of a family's kinds: its own, if anybody has made it, and those in the wings."""
    home = FAMILIES.get(family)
    if home is None:
        return ()
    root = Path(__file__).parent
    found = [home] if (root.parent / home.replace(".", "/")).is_dir() else []
    for wing in WINGS:
        folders = sorted((root / wing).glob(f"**/{home.rpartition('.')[2]}/__init__.py"))
        found += [".".join(folder.parent.relative_to(root.parent).parts) for folder in folders]
    return tuple(found)


def kinds(family: str) -> list[str]:
    """Every kind of a family that can be resolved here, sorted. Imports the family's files."""
    family_root(family)
    for home in _homes(family):
        for module in pkgutil.iter_modules(importlib.import_module(home).__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{home}.{module.name}")
    for kind in _entry_points(family):
        with contextlib.suppress(TorchstoneError):  # a broken package must not hide the others
            _load_point(family, kind)
    return sorted(kind for kind, cls in _KINDS[family].items() if cls.offered)


def lazy_parts(package: str) -> Any:
    """A module ``__getattr__`` so that ``from torchstone.model.attention import SoftmaxAttention`` imports one file.

    A class is looked for in the file whose name, without underscores, starts its own: ``SwiGLUSpec`` is in ``swiglu``.
    """

    def get(name: str) -> Any:
        squashed = name.lower()
        names = [module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)]
        for candidate in sorted(names, key=len, reverse=True):
            if not candidate.startswith("_") and squashed.startswith(candidate.replace("_", "")):
                module = importlib.import_module(f"{package}.{candidate}")
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get


# ------------------------------------------------------------------------------------------- merging and errors


@dataclass
class Changes:
    """What a merge did where the kind of a part changed, for the log and for reports."""

    lines: list[str] = field(default_factory=list)


def _family_of(annotation: Any) -> str | None:
    """The family name if a field's annotation is ``Part[...]`` (or that or None)."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next((name for name in map(_family_of, get_args(annotation)) if name), None)
    if get_origin(annotation) is Annotated and any(isinstance(extra, _Open) for extra in get_args(annotation)[1:]):
        return get_args(annotation)[0].family
    return None


def part_family(info: FieldInfo) -> str | None:
    """The family of a part field of a spec class, or None for other fields."""
    if any(isinstance(extra, _Open) for extra in info.metadata):
        return info.annotation.family  # type: ignore[union-attr]
    return _family_of(info.annotation)


def _spec_of(annotation: Any) -> type[Spec] | None:
    """The nested spec class of a field's annotation, if it is one (or that or None)."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next((spec for spec in map(_spec_of, get_args(annotation)) if spec), None)
    return annotation if inspect.isclass(annotation) and issubclass(annotation, Spec) else None


def _spec_of_values(annotation: Any) -> type[Spec] | None:
    """The spec class of the values of a mapping's annotation, if they are specs."""
    return _spec_of(get_args(annotation)[1]) if get_origin(annotation) is dict else None


def _default_of(info: FieldInfo) -> Any:
    value = info.get_default(call_default_factory=True, validated_data={})
    return value.dump() if isinstance(value, Spec) else None


def merge(
    base: Mapping[str, Any], patch: Mapping[str, Any], spec: type[Spec], changes: Changes | None = None, path: str = ""
) -> dict[str, Any]:
    """`patch` laid over `base`, both plain data of `spec`. Pure: neither argument changes.

    Nested specs merge key by key, and so do mappings of names to specs, of which a name that is given null goes;
    everything else is replaced. Where a patch changes the `kind` of a part,
    only the fields of the family root are kept from `base`; the rest starts from the new kind's defaults. What was
    carried and dropped is appended to `changes`.
    """
    merged = dict(base)
    for name, value in patch.items():
        info = spec.model_fields.get(name)
        here = f"{path}.{name}" if path else name
        family = part_family(info) if info is not None else None
        nested = _spec_of(info.annotation) if info is not None and family is None else None
        if family is not None and isinstance(value, str):
            value = family_root(family).short(value)
        if family is not None and isinstance(value, Mapping) and SHORT in value:
            merged = merge(merged, {name: value[SHORT]}, spec, changes, path)
            value = {k: v for k, v in value.items() if k != SHORT}
        each = _spec_of_values(info.annotation) if info is not None and family is None else None
        if each is not None and isinstance(value, Mapping):
            kept = merged.get(name)
            entries = dict(kept) if isinstance(kept, Mapping) else {}
            for key, one in value.items():
                if isinstance(one, Mapping):
                    old = entries.get(key)
                    one = merge(old if isinstance(old, Mapping) else {}, one, each, changes, f"{here}.{key}")
                entries[key] = one
            merged[name] = {key: one for key, one in entries.items() if one is not None}
            continue
        if not isinstance(value, Mapping) or (family is None and nested is None):
            merged[name] = value
            continue
        old = merged.get(name)
        if family is not None and isinstance(old, str):
            old = family_root(family).short(old)
        if old is None and info is not None:
            old = _default_of(info)
        old = dict(old) if isinstance(old, Mapping) else {}
        if family is not None:
            merged[name] = _merge_part(old, value, family, changes, here)
        else:
            merged[name] = merge(old, value, nested, changes, here)  # type: ignore[arg-type]
    return merged


def _merge_part(
    old: dict[str, Any], patch: Mapping[str, Any], family: str, changes: Changes | None, path: str
) -> dict[str, Any]:
    kind = patch.get("kind", old.get("kind", getattr(family_root(family), "default_kind", None)))
    try:
        cls = resolve(family, kind)
    except (TorchstoneError, AttributeError):  # validation says it in one sentence
        return {**old, **patch}
    before = old.get("kind", getattr(family_root(family), "default_kind", None))
    if old and before is not None and before != kind:
        roots = cls.root_fields()
        kept = {name: value for name, value in old.items() if name in roots}
        dropped = [f"{name}={old[name]!r}" for name in old if name not in roots and name != "kind"]
        given = [name for name in patch if name != "kind"]
        rest = [name for name in cls.model_fields if name not in kept and name not in given]
        if changes is not None:
            changes.lines.append(
                f"{path}: kind {before} -> {kind}; carried {', '.join(kept) or 'nothing'}; "
                f"dropped {', '.join(dropped) or 'nothing'}; defaults for {', '.join(rest) or 'nothing'}"
            )
        old = kept
    body = {name: value for name, value in patch.items() if name != "kind"}
    return {"kind": kind, **merge({k: v for k, v in old.items() if k != "kind"}, body, cls, changes, path)}


def sentence(error: ValidationError, spec: type[Spec] | None = None, where: str = "") -> str:
    """The first error of a pydantic ValidationError as one sentence with the field's path."""
    first = error.errors(include_url=False, include_context=True)[0]
    path = ".".join(str(step) for step in first["loc"] if step not in ("function-plain", "function-after"))
    path = f"{where}.{path}" if where and path else (where or path)
    if first["type"] == "extra_forbidden":
        owner, _, name = path.rpartition(".")
        allowed = _allowed_fields(error, first, spec)
        text = f"{owner or 'recipe'}: no field {name!r}{nearest(name, allowed)}"
        return f"{text}; fields: {', '.join(allowed)}" if allowed else text
    message = first["msg"]
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
    elif first["type"] not in ("part", "missing"):
        message = f"{message[0].lower()}{message[1:]}, got {str(first['input'])[:60]!r}"
    elif first["type"] == "missing":
        message = "is required"
    return f"{path}: {message}" if path else message


def _allowed_fields(error: ValidationError, first: Any, spec: type[Spec] | None) -> list[str]:
    """The fields allowed where an extra one was given, found by walking the spec along the error's location."""
    if spec is None:
        return []
    here: type[Spec] = spec
    value = getattr(error, "torchstone_input", None)
    for step in first["loc"][:-1]:
        value = (
            value.get(step)
            if isinstance(value, Mapping)
            else (value[step] if isinstance(value, list) and isinstance(step, int) and step < len(value) else None)
        )
        if isinstance(step, int) or step not in here.model_fields:
            continue
        info = here.model_fields[step]
        family = part_family(info)
        if family is not None:
            kind = value if isinstance(value, str) else value.get("kind") if isinstance(value, Mapping) else None
            kind = kind or getattr(family_root(family), "default_kind", None)
            if not isinstance(kind, str):
                return []
            here = resolve(family, kind)
        else:
            here = _spec_of(info.annotation) or here
    return (["kind"] if issubclass(here, PartSpec) and here.kind else []) + list(here.model_fields)


_S = TypeVar("_S", bound=Spec)


def validate(spec: type[_S], data: Any, where: str = "") -> _S:
    """`data` as a `spec`.

    Raises:
        TorchstoneError: one sentence: the field, what was given, what is allowed, the nearest match.
    """
    if not isinstance(data, Mapping):
        raise TorchstoneError(f"{where or spec.__name__}: needs a mapping of fields, got {str(data)[:60]!r}")
    try:
        return spec.model_validate(data)
    except ValidationError as error:
        error.torchstone_input = data  # type: ignore[attr-defined]
        raise TorchstoneError(sentence(error, spec, where)) from None


# ------------------------------------------------------------------------------------------------- JSON schema


def _walk(spec: type[Spec], seen: set[type[Spec]]) -> Iterator[str]:
    """Families reachable from the part fields of a spec and of the specs nested in it."""
    if spec in seen:
        return
    seen.add(spec)
    for info in spec.model_fields.values():
        family = part_family(info)
        if family is not None:
            yield family
        elif (nested := _spec_of(info.annotation)) is not None:
            yield from _walk(nested, seen)


def json_schema(spec: type[Spec]) -> dict[str, Any]:
    """JSON schema of a spec with every kind of every family that it reaches, under ``$defs`` as ``family.kind``."""
    definitions: dict[str, Any] = {}
    todo, done = list(dict.fromkeys(_walk(spec, set()))), set()
    while todo:
        family = todo.pop()
        if family in done:
            continue
        done.add(family)
        names = kinds(family)
        root = family_root(family)
        default = getattr(root, "default_kind", None)
        plain = "short" not in root.__dict__
        word: dict[str, Any] = {"enum": names} if plain else {"type": "string"}
        definitions[family] = {"oneOf": [*({"$ref": f"#/$defs/{family}.{name}"} for name in names), word]}
        for name in names:
            cls = resolve(family, name)
            body = _own_schema(cls, definitions)
            body["properties"] = {"kind": {"const": name}, **body.get("properties", {})}
            if name != default:  # without a kind, it is the default one
                body["required"] = ["kind", *body.get("required", [])]
            definitions[f"{family}.{name}"] = body
            todo.extend(_walk(cls, set()))
    schema = _own_schema(spec, definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "$defs": definitions}


def _own_schema(spec: type[Spec], definitions: dict[str, Any]) -> dict[str, Any]:
    body = spec.model_json_schema()
    definitions.update(body.pop("$defs", {}))
    nested = {cls.__name__: cls for info in spec.model_fields.values() if (cls := _spec_of(info.annotation))}
    _refer(spec, body)
    for name, cls in nested.items():
        if name in definitions:
            _refer(cls, definitions[name])
    return body


def _refer(spec: type[Spec], body: dict[str, Any]) -> None:
    """Let the part fields of a schema refer to their families."""
    for name, info in spec.model_fields.items():
        family = part_family(info)
        if family is not None:
            ref = {"$ref": f"#/$defs/{family}"}
            optional = type(None) in get_args(info.annotation)
            body["properties"][name] = {
                **({"anyOf": [ref, {"type": "null"}]} if optional else ref),
                "description": info.description or "",
            }
