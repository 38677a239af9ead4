"""Layouts: how a published checkpoint spells a model that the backbone can build, in both directions.

    layout = find_layout(config["model_type"])
    spec = validate(TransformerSpec, layout.to_spec(config))
    load_state(model := spec.build(), layout.read(spec, shapes, get))        # one tensor at a time
    layout.to_config(spec), dict(layout.write(spec, model.state_dict().__getitem__))

A `Layout` is data: a table of rules (our parameter's pattern, their tensors' patterns, a transform) and two functions
for the config. Which parameters exist, and their shapes and slices, is asked of the model itself, built on the meta
device; so one table serves tied and untied, with biases and without.

*Theirs* are tensors of a checkpoint, *ours* parameters of a `Transformer`, and the buffers that it keeps.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from torchstone.errors import TorchstoneError, nearest
from torchstone.model.stack import LayerSpec
from torchstone.model.stack.multiway import MultiwayLinear
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.spec import validate

__all__ = [
    "HEAD_BY_HEAD",
    "PIECES",
    "TRANSPOSED",
    "Config",
    "Copy",
    "HeadByHead",
    "Layout",
    "Model",
    "Rule",
    "Shapes",
    "compare_shapes",
    "find_layout",
    "layouts",
    "load_state",
    "tensors_of",
]

Shapes = Mapping[str, Sequence[int]]
"""Names of the tensors of a checkpoint and their shapes: what a shard's header says before any data is read."""
Get = Callable[[str], torch.Tensor]
"""The tensor of a name; may read it from disk."""

# ------------------------------------------------------------------------------------------------------ the table


class Pieces:
    """Theirs are slices of ours along the first axis, in order; a single one is ours as it stands."""

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Ours from theirs."""
        return theirs[0] if len(theirs) == 1 else torch.cat(list(theirs))

    def split(self, ours: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Theirs from ours."""
        return list(ours.split(list(sizes)))

    def shapes(self, ours: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, ...]]:
        """The shapes that theirs must have."""
        return [(size, *ours[1:]) for size in sizes]

    def at(self, spec: TransformerSpec, slices: Sequence[int]) -> Pieces:
        """The transform for a projection of this spec with these slices."""
        return self


class Transposed(Pieces):
    """As `Pieces`, with matrices stored (inputs, outputs)."""

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        return super().join([piece.t() if piece.dim() == 2 else piece for piece in theirs])

    def split(self, ours: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        return [piece.t() if piece.dim() == 2 else piece for piece in super().split(ours, sizes)]

    def shapes(self, ours: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, ...]]:
        return [shape[::-1] for shape in super().shapes(ours, sizes)]


@dataclass(frozen=True)
class HeadByHead(Pieces):
    """Theirs is one tensor with all our slices of the first head, then all of the second, and so on."""

    heads: int = 1
    slices: tuple[int, ...] = ()

    def at(self, spec: TransformerSpec, slices: Sequence[int]) -> Pieces:
        return HeadByHead(spec.attention.heads, tuple(slices))

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        pieces = theirs[0].unflatten(0, (self.heads, -1)).split([size // self.heads for size in self.slices], 1)
        return torch.cat([piece.flatten(0, 1) for piece in pieces])

    def split(self, ours: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        pieces = [piece.unflatten(0, (self.heads, -1)) for piece in ours.split(list(self.slices))]
        return [torch.cat(pieces, 1).flatten(0, 1)]


PIECES = Pieces()
TRANSPOSED = Transposed()
HEAD_BY_HEAD = HeadByHead()


@dataclass(frozen=True)
class Rule:
    """One row of the table: a pattern of our names, theirs in the order of our slices, and the transform between.

    ``{i}`` stands for a layer's number and ``{p}`` for "weight" or "bias". With ``{e}`` in theirs the row is about a
    bank of experts' projections, and they are repeated for each of them, ``{e}`` being its number; with ``{m}`` about
    one of modalities' projections, ``{m}`` being a letter. `where`: of which specs it holds, if not of all.
    """

    ours: str
    theirs: str | tuple[str, ...]
    transform: Pieces = PIECES
    where: Callable[[TransformerSpec], bool] | None = None

    def match(self, name: str, count: int | None = None, each: str = "e") -> tuple[str, ...] | None:
        """Their names for the parameter `name` of ours; None if the rule is about another.

        `count`: projections in the bank that the parameter belongs to; None if it belongs to none. `each`: "e" or "m",
        what has one of them.
        """
        pattern = re.escape(self.ours).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{p\}", "(?P<p>weight|bias)")
        found = re.fullmatch(pattern, name)
        theirs = (self.theirs,) if isinstance(self.theirs, str) else self.theirs
        asked = next((mark for mark in ("e", "m") if f"{{{mark}}}" in theirs[0]), None)
        if found is None or asked != (None if count is None else each):
            return None
        named = found.groupdict()
        return tuple(their.format(e=n, m=chr(65 + n), **named) for n in range(count or 1) for their in theirs)


@dataclass(frozen=True)
class Copy:
    """A tensor of theirs that repeats another one: a tied matrix. It is no copy where a rule of the spec uses it.

    Read in place of `of` where that is absent. `equal`: refuse one that differs, for then the model is not tied as its
    config says. `written`: whether readers of the layout expect it besides `of`.
    """

    name: str
    of: str
    equal: bool = True
    written: bool = False


@dataclass(frozen=True)
class Step:
    """One parameter of ours with this `shape`, and the tensors of theirs that it is made of."""

    ours: str
    shape: tuple[int, ...]
    theirs: tuple[str, ...]
    sizes: tuple[int, ...]
    transform: Pieces

    def needs(self) -> dict[str, tuple[int, ...]]:
        """Their names and the shapes they must have."""
        return dict(zip(self.theirs, self.transform.shapes(self.shape, self.sizes), strict=True))


# ----------------------------------------------------------------------------------------------------- the config


class Config:
    """The content of a config.json, read with one-sentence errors. A value that is null counts as absent."""

    def __init__(self, model_type: str, values: Mapping[str, Any]) -> None:
        self.model_type, self.values = model_type, values

    def get(self, key: str, default: Any) -> Any:
        """The value, or what the layout's own code assumes without it."""
        value = self.values.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        """A value without which there is no model.

        Raises:
            TorchstoneError: it is absent.
        """
        value = self.values.get(key)
        if value is None:
            raise TorchstoneError(f"{self.model_type} config: {key} is required")
        return value

    def choose(self, key: str, allowed: Mapping[str, Any], default: str) -> Any:
        """What `allowed` has for the value.

        Raises:
            TorchstoneError: it has nothing for it.
        """
        value = self.get(key, default)
        if not isinstance(value, str) or value not in allowed:
            raise TorchstoneError(
                f"{self.model_type} config: {key} {value!r} is not supported{nearest(value, allowed)}; "
                f"supported: {', '.join(allowed)}"
            )
        return allowed[value]

    def only(self, key: str, value: Any) -> None:
        """Refuse an option of the layout that the backbone has not.

        Raises:
            TorchstoneError: the config has another value than this one, which is also the layout's default.
        """
        if self.get(key, value) != value:
            raise TorchstoneError(
                f"{self.model_type} config: {key} {self.values[key]!r} is not supported; supported: {value!r}"
            )


@dataclass(frozen=True)
class Model:
    """A spec as a layout writes it down: layers patched, and every size a number.

    Attributes:
        context: positions.
        encoder, decoder: specs of the layers.
    """

    spec: TransformerSpec
    context: int
    encoder: tuple[LayerSpec, ...]
    decoder: tuple[LayerSpec, ...]

    @classmethod
    def of(cls, spec: TransformerSpec, built: Transformer) -> Model:
        """Of a spec and the model it builds (on any device)."""

        def filled(layer: LayerSpec, block: Any) -> LayerSpec:
            attention: Any = layer.attention
            K = attention.head_size(spec.width)
            defaults = {"head_dim": K, "kv_heads": attention.heads, "scale": K**-0.5}
            left_open = {name: value for name, value in defaults.items() if getattr(attention, name, value) is None}
            ffn: dict[str, Any] = {"hidden": layer.ffn.hidden or block.ffn.down.weight.shape[1]}
            router = getattr(layer.ffn, "router", None)
            if router is not None and getattr(router, "keep_groups", 0) is None:
                ffn["router"] = router.model_copy(update={"keep_groups": router.groups})
            return layer.model_copy(
                update={
                    "attention": attention.model_copy(update=left_open),
                    "ffn": layer.ffn.model_copy(update=ffn),
                }
            )

        def side(name: Any) -> tuple[LayerSpec, ...]:
            plan = spec.plan(name)
            return tuple(filled(layer, built.stacks[name].layers[i]) for i, layer in enumerate(plan))

        return cls(spec, spec.context or 1024, side("encoder"), side("decoder"))

    def facts(self) -> dict[str, Any]:
        """What the model computes, by dotted path: all that the spec says except how it starts and is trained, and
        which of equal forms runs."""
        spec = self.spec
        top = {name: getattr(spec, name) for name in ("vocabulary", "width", "causal")}
        parts = {name: getattr(spec, name).dump() for name in ("embedding", "head", "stack")}
        parts["embedding"] |= {"size": spec.embedding.table_width(spec.width)}
        sides = {name: [layer.dump() for layer in getattr(self, name)] for name in ("encoder", "decoder")}
        return dict(_flat({**top, "context": self.context, **parts, **sides}))


_PLAIN = {
    "embedding": ("token",),
    "stack": ("plain",),
    "attention": ("softmax",),
    "linear": ("dense",),
    "block": ("sequential",),
}
"""Kinds that every layout so far has."""

_NO_FACTS = frozenset(
    {
        *("dropout", "drop_path", "std", "scale_outputs", "form"),
        *("capacity", "balance", "group_balance", "sequence_balance", "update_rate", "update_steps"),
    }
)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name not in _NO_FACTS:
                yield from _flat(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{path}.layers.{number}")
    else:
        yield path, value


# ----------------------------------------------------------------------------------------------------- the layout


@dataclass(frozen=True)
class Layout:
    """A published layout.

    Attributes:
        model_type: as in config.json.
        sides: the stacks it has, "encoder" and "decoder".
        architectures: class names that config.json may give -> kind of our head; the first is the default.
        kinds: the parts that it can express: family -> kinds (where it is not only the plainest one).
        spec: config (and the checkpoint's tensors, where the config alone leaves it open) -> `TransformerSpec` as plain
            data. It gets the kind of head too.
        config: a model of these kinds -> the config.
        rules: the table for everything but the head.  heads: kind of head -> its rows.
        copies: tensors that repeat others.
        skipped: patterns of tensors that hold nothing of the model: buffers, heads that were not asked for, layers
            beyond the last, whose number is ``{depth}``.
        prefix: what checkpoints of the bare model, without a head, leave out of their names.
        renamed: (old, new) substrings of names in checkpoints of earlier times.
        free: paths of the spec that have no meaning in this layout.
        misread: endings of modules that PEFT, in this model type, takes for something else: experts.
        quantised: ways to quantise weights that can be read.
        hub: whether transformers reads it; one that it does not is written only when it is asked for.
    """

    model_type: str
    sides: tuple[str, ...]
    architectures: Mapping[str, str]
    kinds: Mapping[str, tuple[str, ...]]
    spec: Callable[[Config, str, Shapes | None], dict[str, Any]]
    config: Callable[[Model], dict[str, Any]]
    rules: tuple[Rule, ...]
    heads: Mapping[str, tuple[Rule, ...]]
    copies: tuple[Copy, ...] = ()
    skipped: tuple[str, ...] = ()
    prefix: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    free: frozenset[str] = field(default=frozenset())
    misread: tuple[str, ...] = ()
    quantised: tuple[str, ...] = ("fp8",)
    hub: bool = True

    # -- config

    def to_spec(self, config: Mapping[str, Any], shapes: Shapes | None = None) -> dict[str, Any]:
        """The `TransformerSpec`, as plain data, of a config.json.

        Raises:
            TorchstoneError: an architecture or an option that the backbone has not.
        """
        given = (config.get("architectures") or [None])[0] or next(iter(self.architectures))
        if given not in self.architectures:
            raise TorchstoneError(
                f"{self.model_type} config: architecture {given!r} is not supported"
                f"{nearest(given, self.architectures)}; supported: {', '.join(self.architectures)}"
            )
        quantised = config.get("quantization_config")
        if quantised:
            way = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
            if way not in self.quantised:
                raise TorchstoneError(
                    f"{self.model_type} config: weights quantised by {way!r} (quantization_config) cannot be read; "
                    f"supported: {', '.join(self.quantised)}"
                )
        return self.spec(Config(self.model_type, config), self.architectures[given], shapes)

    def to_config(self, spec: TransformerSpec) -> dict[str, Any]:
        """The config.json of a spec. It says nothing of special tokens: those are the tokenizer's.

        Raises:
            TorchstoneError: the layout has no place for something in the spec.
        """
        self._check_kinds(spec)
        model = Model.of(spec, _on_meta(spec))
        head = spec.head.kind
        architecture = next(name for name, kind in self.architectures.items() if kind == head)
        config = {"model_type": self.model_type, "architectures": [architecture], **self.config(model)}
        again = validate(TransformerSpec, self.to_spec(config))
        wanted, got = model.facts(), Model.of(again, _on_meta(again)).facts()
        # another kind of part has other fields: it is the kind that does not fit
        for path in sorted({*wanted, *got} - self.free, key=lambda path: (not path.endswith(".kind"), path)):
            if not _alike(wanted.get(path), got.get(path)):
                raise self._misfit(path, wanted.get(path), got.get(path))
        return config

    def _check_kinds(self, spec: TransformerSpec) -> None:
        sides = tuple(side for side, depth in zip(("encoder", "decoder"), spec.depths, strict=True) if depth)
        if sides != self.sides:
            raise self._misfit("an", " and ".join(sides), " and ".join(self.sides))
        allowed = {**_PLAIN, **self.kinds, "head": tuple(self.architectures.values())}
        layers = (*spec.plan("encoder"), *spec.plan("decoder"))
        for family, kinds in allowed.items():
            holders: Sequence[Any] = layers if family in LayerSpec.model_fields else (spec,)
            if family == "router":
                holders = [layer.ffn for layer in layers if hasattr(layer.ffn, "router")]
            for kind in (getattr(holder, family).kind for holder in holders):
                if kind not in kinds:
                    raise self._misfit(family, kind, " or ".join(dict.fromkeys(kinds)))

    def _misfit(self, path: str, wanted: Any, got: Any) -> TorchstoneError:
        return TorchstoneError(f"the {self.model_type} layout has no place for {path} {wanted}; it takes {got}")

    # -- tensors

    def steps(self, spec: TransformerSpec) -> list[Step]:
        """How each parameter of ours is made, in the model's order.

        Raises:
            TorchstoneError: a parameter has no row in the table.
        """
        model = _on_meta(spec)
        rules = [rule for rule in self.rules if rule.where is None or rule.where(spec)]
        rules += self.heads.get(spec.head.kind, ())
        steps = []
        for name, tensor in tensors_of(model).items():
            holder: Any = model.get_submodule(name.rpartition(".")[0])
            count = getattr(holder, "count", None)  # of a bank of projections, or of vectors
            each = "m" if isinstance(holder, MultiwayLinear) else "e"
            found = next(((rule, theirs) for rule in rules if (theirs := rule.match(name, count, each))), None)
            if found is None:
                raise TorchstoneError(f"the {self.model_type} layout has no place for the parameter {name}")
            rule, theirs = found
            shape = tuple(tensor.shape)
            sizes = shape[:1] if len(theirs) == 1 else _slices(holder, name)
            transform = rule.transform.at(spec, getattr(holder, "slices", ()))
            steps.append(Step(name, shape, theirs, sizes, transform))
        return steps

    def _names(self, shapes: Shapes) -> dict[str, str]:
        """Names as the table spells them -> names as the checkpoint does."""
        bare = bool(self.prefix) and not any(name.startswith(self.prefix) for name in shapes)
        spelt = {}
        for name in shapes:
            full = f"{self.prefix}{name}" if bare else name
            for old, new in self.renamed:
                full = full.replace(old, new)
            spelt[full] = name
        return spelt

    def read(self, spec: TransformerSpec, shapes: Shapes, get: Get) -> Iterator[tuple[str, torch.Tensor]]:
        """Our parameters from their tensors, one at a time: nothing is read before the names and shapes are checked,
        and then only what the next parameter is made of.

        Raises:
            TorchstoneError: missing, surplus and mis-shaped tensors, all by name in one sentence; a tied copy that
                differs.
        """
        steps, names = self.steps(spec), self._names(shapes)
        used = {theirs for step in steps for theirs in step.theirs}
        copies = [copy for copy in self.copies if copy.name not in used]
        for copy in copies:
            if copy.name in names and copy.of not in names:
                names[copy.of] = names.pop(copy.name)
        needs = {name: shape for step in steps for name, shape in step.needs().items()}
        known = {*needs, *(copy.name for copy in copies)}
        _refuse(
            f"{self.model_type} checkpoint",
            missing=[name for name in needs if name not in names],
            surplus=[names[name] for name in names if name not in known and not self._skips(name, spec)],
            shapes={
                names[name]: (tuple(shapes[names[name]]), shape)
                for name, shape in needs.items()
                if name in names and tuple(shapes[names[name]]) != shape
            },
        )
        # all refusals come before the first tensor: a generator would check only when asked for it
        for copy in copies:
            if copy.equal and copy.name in names and not torch.equal(get(names[copy.name]), get(names[copy.of])):
                raise TorchstoneError(
                    f"{self.model_type} checkpoint: {names[copy.name]} differs from {names[copy.of]}, to which the "
                    "config ties it"
                )
        return ((step.ours, step.transform.join([get(names[name]) for name in step.theirs])) for step in steps)

    def _skips(self, name: str, spec: TransformerSpec) -> bool:
        return any(fnmatchcase(name, pattern.format(depth=spec.depth)) for pattern in self.skipped)

    def left(self, spec: TransformerSpec, shapes: Shapes) -> list[str]:
        """Tensors of theirs that `read` leaves: buffers, and heads that were not asked for."""
        used = {theirs for step in self.steps(spec) for theirs in step.theirs}
        used |= {copy.name for copy in self.copies}
        return [given for name, given in self._names(shapes).items() if name not in used and self._skips(name, spec)]

    def write(self, spec: TransformerSpec, get: Get) -> Iterator[tuple[str, torch.Tensor]]:
        """Their tensors from our parameters, one parameter at a time, contiguous."""
        steps = self.steps(spec)
        used = {theirs for step in steps for theirs in step.theirs}
        copies = [copy for copy in self.copies if copy.written and copy.name not in used]

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for step in steps:
                for name, tensor in zip(step.theirs, step.transform.split(get(step.ours), step.sizes), strict=True):
                    yield name, tensor.contiguous()
                    yield from ((copy.name, tensor.clone()) for copy in copies if copy.of == name)

        return tensors()

    def to_ours(self, tensors: Mapping[str, torch.Tensor], spec: TransformerSpec) -> dict[str, torch.Tensor]:
        """All our parameters from tensors in memory; see `read`."""
        return dict(self.read(spec, {name: tensor.shape for name, tensor in tensors.items()}, tensors.__getitem__))

    def to_theirs(self, tensors: Mapping[str, torch.Tensor], spec: TransformerSpec) -> dict[str, torch.Tensor]:
        """All their tensors from our parameters in memory; see `write`.

        Raises:
            TorchstoneError: missing, surplus and mis-shaped parameters, all by name in one sentence.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        compare_shapes("model state", {step.ours: step.shape for step in self.steps(spec)}, shapes)
        return dict(self.write(spec, tensors.__getitem__))


def _slices(holder: Any, name: str) -> tuple[int, ...]:
    """What a fused projection knows: sizes of the slices of its matrix, or of those that have a bias."""
    if not name.endswith(".bias") or isinstance(holder.biased, bool):
        return tuple(holder.slices)
    return tuple(size for size, has in zip(holder.slices, holder.biased, strict=True) if has)


def _on_meta(spec: TransformerSpec) -> Transformer:
    with torch.device("meta"):
        return spec.build()


def _alike(a: Any, b: Any) -> bool:
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b))
    return abs(a - b) <= 1e-12 * abs(b) if numbers else a == b


# ------------------------------------------------------------------------------------------------- finding layouts


def layouts() -> list[str]:
    """The layouts that have a file, by `model_type`."""
    home = importlib.import_module("torchstone.interop.layouts")
    return sorted(module.name for module in pkgutil.iter_modules(home.__path__) if not module.name.startswith("_"))


def find_layout(model_type: str) -> Layout:
    """The layout of a `model_type`; imports its file alone.

    Raises:
        TorchstoneError: there is none; the message lists those there are.
    """
    name = str(model_type).replace("-", "_")
    if name not in layouts():
        raise TorchstoneError(
            f"no layout for model_type {model_type!r}{nearest(name, layouts())}; layouts: {', '.join(layouts())}"
        )
    return importlib.import_module(f"torchstone.interop.layouts.{name}").LAYOUT


# ------------------------------------------------------------------------------------------------ loading a model


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters of a model and the buffers that it keeps, by name, in the model's order."""
    return model.state_dict(keep_vars=True)


def load_state(model: nn.Module, tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> None:
    """Put tensors into a model's parameters and buffers, each in its own precision there, one at a time. What is on the
    meta device gets memory of its own.

    Raises:
        TorchstoneError: missing, surplus and mis-shaped tensors, all by name in one sentence. From a mapping nothing
            has changed then; from an iterable, whose names are not known before, the model is part old and part new.
    """
    wanted = tensors_of(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in wanted.items()}
    if isinstance(tensors, Mapping):
        compare_shapes("model state", shapes, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        tensors = tensors.items()
    seen: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors:
        seen[name] = tuple(tensor.shape)
        if shapes.get(name) == tuple(tensor.shape):
            _put(model, name, wanted[name], tensor)
    compare_shapes("model state", shapes, seen)


def _put(model: nn.Module, name: str, own: torch.Tensor, tensor: torch.Tensor) -> None:
    if own.is_meta:
        path, _, last = name.rpartition(".")
        # a copy: the tensor may be a view of a memory-mapped file
        fresh = torch.empty(tensor.shape, dtype=own.dtype, device=tensor.device).copy_(tensor)
        if isinstance(own, nn.Parameter):
            fresh = nn.Parameter(fresh, requires_grad=own.requires_grad)
        setattr(model.get_submodule(path), last, fresh)
    else:
        with torch.no_grad():
            own.copy_(tensor)


def compare_shapes(what: str, wanted: Mapping[str, tuple[int, ...]], given: Shapes) -> None:
    """Refuse tensors other than the wanted ones.

    Raises:
        TorchstoneError: missing, surplus and mis-shaped tensors, all by name in one sentence that begins with `what`.
    """
    _refuse(
        what,
        missing=[name for name in wanted if name not in given],
        surplus=[name for name in given if name not in wanted],
        shapes={
            name: (tuple(given[name]), shape)
            for name, shape in wanted.items()
            if name in given and tuple(given[name]) != shape
        },
    )


def _refuse(
    what: str,
    missing: Sequence[str],
    surplus: Sequence[str],
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> None:
    """One sentence with everything that is wrong, if anything is."""
    faults = [f"missing {', '.join(_folded(missing))}"] if missing else []
    faults += [f"surplus {', '.join(_folded(surplus))}"] if surplus else []
    faults += [f"{name} has shape {got}, not {wanted}" for name, (got, wanted) in shapes.items()]
    if faults:
        raise TorchstoneError(f"{what}: {'; '.join(faults)}")


def _folded(names: Sequence[str]) -> list[str]:
    """The names, those that differ in the number of the layer or the expert alone as one:
    ``layers.{0,1,2}.norm.weight``."""
    return _fold(_fold(names, r"\.(\d+)\."), r"\.experts\.(\d+)\.")


def _fold(names: Sequence[str], number: str) -> list[str]:
    numbers: dict[tuple[str, str], list[str]] = {}
    for name in names:
        found = re.search(number, name)
        ends = (name[: found.start(1)], name[found.end(1) :]) if found else (name, "")
        numbers.setdefault(ends, []).append(found.group(1) if found else "")
    return [
        f"{head}{at[0]}{tail}" if len(at) == 1 else f"{head}{{{','.join(at)}}}{tail}"
        for (head, tail), at in numbers.items()
    ]
