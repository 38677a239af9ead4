"""Recipe: everything that a training is, as one frozen document.

A recipe is YAML; ``key.sub=value`` overrides are laid over it; the resolved document is written into the run.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field, model_validator
from torch import nn

from torchstone.data import DataSpec
from torchstone.errors import TorchstoneError, nearest
from torchstone.model import ModelSpec
from torchstone.objectives import ObjectiveSpec
from torchstone.spec import SHORT, Changes, Part, PartSpec, Spec, family_root, merge, part, resolve, validate

__all__ = [
    "AdaptSpec",
    "EvaluateSpec",
    "OptimizerSpec",
    "ParallelSpec",
    "Recipe",
    "ScheduleSpec",
    "TrainerSpec",
    "dump_yaml",
    "load_recipe",
    "parse_override",
    "parse_yaml",
]


class OptimizerSpec(PartSpec):
    """How parameters move. The kinds are in torchstone.train.optimizers."""

    family: ClassVar[str] = "optimizer"
    default_kind: ClassVar[str] = "adamw"

    lr: float = Field(1e-3, gt=0, le=100)
    """Peak learning rate."""
    weight_decay: float = Field(0.1, ge=0, le=10)
    """Decoupled weight decay of matrices; norms, biases and other vectors have none."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor on the learning rate for each layer that a parameter lies below the top: less for what was learned before
    (BEiT, ELECTRA). Heads have the whole rate, layer l of L the factor to the power of L + 1 - l, embeddings L + 1."""

    def build(self, named: Any) -> Any:
        """A torch optimizer for these `NamedParameter`s."""
        raise NotImplementedError


class ScheduleSpec(PartSpec):
    """How the learning rate moves. The kinds are in torchstone.train.schedules."""

    family: ClassVar[str] = "schedule"
    default_kind: ClassVar[str] = "cosine"

    warmup: int = Field(0, ge=0, lt=10**8)
    """Steps of linear warm-up from zero."""

    def factor(self, step: int, steps: int) -> float:
        """Factor on the peak learning rate at `step` of `steps`, both from 0, after the warm-up's part in it."""
        rise = min(1.0, (step + 1) / (self.warmup + 1)) if self.warmup else 1.0
        return rise * self.shape(max(0, step - self.warmup), max(1, steps - self.warmup))

    def shape(self, step: int, steps: int) -> float:
        """Factor after the warm-up."""
        raise NotImplementedError


class AdaptSpec(PartSpec):
    """How the model of a run is adapted. The kinds are in torchstone.adapt."""

    family: ClassVar[str] = "adapt"

    def apply(self, spec: ModelSpec) -> ModelSpec:
        """The spec of the adapted model; of one that is adapted in this way already, the same."""
        return spec

    def is_new(self, name: str) -> bool:
        """Whether a parameter of the adapted model is none of the model that it starts from."""
        return False

    def starts_from(self, name: str) -> str | None:
        """The parameter of the same model whose value a new one takes first, if that exists; None draws one."""
        return None

    def prepare(self, model: nn.Module) -> None:
        """Choose the parameters that train, by ``requires_grad``."""

    def gate(self, named: Any, key: Any) -> Any:
        """What stands between a step's gradient and the optimiser, a `torchstone.train.gate.GradientGate`; None if
        nothing does. `named` are the parameters that train, `key` is for what it draws.

        Raises:
            TorchstoneError: it has no parameter to act on.
        """
        return None


class TrainerSpec(Spec):
    """The training loop."""

    steps: int = Field(1000, ge=1, lt=10**8)
    """Optimiser steps."""
    batch: int = Field(8, ge=1, le=2**20)
    """Sequences in one micro-batch on one rank."""
    accumulate: int = Field(1, ge=1, le=2**20)
    """Micro-batches in one step."""
    clip: float | None = Field(1.0, gt=0)
    """Largest norm of the gradient; null never clips."""
    clip_norm: Literal["total", "sparse"] = "total"
    """Norm that is clipped: of all gradients, or with those of E experts over sqrt(E), so that more experts do not
    shrink the rest (SparseClip, in the code of Chi et al. 2022, arXiv 2204.09179)."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """Type of matrix products; parameters and optimiser state are float32 either way. auto takes bf16 where the device
    multiplies in it, and records what it took."""
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """auto, cpu, cuda, cuda:N or mps."""
    threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads; null takes the machine's cores and records how many."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of each block; auto decides once from recipe and shapes and records it."""
    recompute: bool = False
    """Drop activations of each layer and make them again in the backward pass."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, kept beside them."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of every random draw."""
    log_every: int = Field(10, ge=1)
    """Steps between rows of training metrics."""
    save_every: int = Field(200, ge=1)
    """Steps between checkpoints."""
    keep_last: int = Field(2, ge=1)
    """Checkpoints kept, the newest ones."""
    keep_best: bool = False
    """Keep the checkpoint with the lowest validation loss too."""
    tensorboard: bool = False
    """Write TensorBoard events too (needs the extra `track`)."""


class ParallelSpec(Spec):
    """Sizes of the mesh's axes, and what replicas share."""

    data: int = Field(1, ge=1)
    """Replicas that see different batches."""
    shard: int = Field(1, ge=1)
    """Ranks that share one copy of parameters and optimiser state."""
    tensor: int = Field(1, ge=1)
    """Ranks that split each matrix."""
    context: int = Field(1, ge=1)
    """Ranks that split each sequence."""
    expert: int = Field(1, ge=1)
    """Ranks that hold different experts."""
    pipeline: int = Field(1, ge=1)
    """Ranks that hold different layers."""
    zero: int = Field(0, ge=0, le=1)
    """Stage of ZeRO over the data axis: with 1 each replica keeps the optimiser's state of its share of the parameters
    alone, moves those, and sends them to the others."""


class EvaluateSpec(Spec):
    """Validation during training, and the test at its end."""

    every: int = Field(200, ge=1)
    """Steps between validations."""
    blocks: int | None = Field(128, ge=1)
    """Blocks of the validation split that are looked at, spread evenly; null means all."""
    test: bool = True
    """Measure the test split at the end."""
    test_blocks: int | None = Field(None, ge=1)
    """Blocks of the test split that are looked at, spread evenly; null means all."""


class Recipe(Spec):
    """A training, whole."""

    model: Part[ModelSpec] = part("transformer", "model")
    """What is trained."""
    data: Part[DataSpec] = part("text", "data")
    """What it is trained on."""
    objective: Part[ObjectiveSpec] = part("causal_lm", "objective")
    """What is minimised."""
    optimizer: Part[OptimizerSpec] = part("adamw", "optimizer")
    """How parameters move."""
    schedule: Part[ScheduleSpec] = part("cosine", "schedule")
    """How the learning rate moves."""
    trainer: TrainerSpec = TrainerSpec()
    """The loop."""
    parallel: ParallelSpec = ParallelSpec()
    """The mesh."""
    adapt: Part[AdaptSpec] | None = None
    """How the model of `init_from` is adapted."""
    init_from: str | None = None
    """A run whose weights training starts from."""
    evaluate: EvaluateSpec = EvaluateSpec()
    """Validation and test."""

    @model_validator(mode="after")
    def _of_one_kind(self) -> Recipe:
        for name, section in (("objective", self.objective), ("model", self.model)):
            if section.example not in (None, self.data.example):
                raise ValueError(
                    f"data {self.data.kind} is of {self.data.example}, and {name} {section.kind} of {section.example}"
                )
        return self

    @model_validator(mode="after")
    def _paired(self) -> Recipe:
        if self.objective.paired and not self.data.paired:
            raise ValueError(f"objective {self.objective.kind} compares pairs, and data {self.data.kind} has none")
        if self.data.paired and not self.objective.paired:
            raise ValueError(f"data {self.data.kind} has pairs, and objective {self.objective.kind} compares none")
        return self

    def yaml(self) -> str:
        """The whole document as YAML."""
        return dump_yaml(self.dump())

    def hash(self) -> str:
        """SHA-256 of the document in canonical JSON, hexadecimal."""
        return hashlib.sha256(json.dumps(self.dump(), sort_keys=True).encode()).hexdigest()

    def override(self, patch: Mapping[str, Any], changes: Changes | None = None) -> Recipe:
        """This recipe with a patch of plain data laid over it; see `torchstone.spec.merge`."""
        return validate(Recipe, merge(self.dump(), patch, Recipe, changes))

    def adapted(self) -> Recipe:
        """This recipe with the model as `adapt` makes it.

        Raises:
            TorchstoneError: `adapt` without `init_from`, or on a model that it does not fit.
        """
        if self.adapt is None:
            return self
        if self.init_from is None:
            raise TorchstoneError("adapt: needs init_from, the run that is adapted")
        return self.model_copy(update={"model": self.adapt.apply(self.model)})

    def differences(self, other: Recipe) -> list[str]:
        """Paths of the fields in which two recipes differ, with both values."""
        return list(_differences(self.dump(), other.dump(), ""))


def _differences(a: Any, b: Any, path: str) -> Iterable[str]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in dict.fromkeys([*a, *b]):
            here = f"{path}.{name}" if path else name
            if name not in a or name not in b:
                yield f"{here} ({a.get(name, 'absent')!r} here, {b.get(name, 'absent')!r} there)"
            else:
                yield from _differences(a[name], b[name], here)
    elif a != b:
        yield f"{path} ({a!r} here, {b!r} there)"


# ------------------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `1e-3` is a number, and yes, no, on and off are words."""

    yaml_implicit_resolvers = {}


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key, _ in node.value:
        name = getattr(key, "value", None)
        if isinstance(name, str) and name in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} stands twice", key.start_mark)
        seen.add(name if isinstance(name, str) else id(key))
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str, where: str = "YAML") -> Any:
    """Plain data of a YAML document.

    Raises:
        TorchstoneError: not YAML, or a key that stands twice; names the line.
    """
    try:
        return yaml.load(text, _Loader)  # a subclass of SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f" line {mark.line + 1}" if mark else ""
        raise TorchstoneError(f"{where}{at}: {getattr(error, 'problem', None) or error}") from None


class _Dumper(yaml.SafeDumper):
    """Quotes every text that we or a reader of YAML 1.1 would take for a number or a truth value."""


for _first, _resolvers in _Loader.yaml_implicit_resolvers.items():
    for _tag, _pattern in _resolvers:
        _Dumper.add_implicit_resolver(_tag, _pattern, [_first])


def dump_yaml(data: Any) -> str:
    """YAML of plain data, keys in the order of the specs."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def parse_override(text: str) -> dict[str, Any]:
    """``model.attention.kind=retention`` as a nested patch. The value is YAML.

    Raises:
        TorchstoneError: no ``=``, or an empty step in the path.
    """
    path, equals, value = text.partition("=")
    steps = path.strip().split(".")
    if not equals or not all(steps):
        raise TorchstoneError(f"override {text!r}: needs the form field.sub=value")
    patch: Any = parse_yaml(value, f"override {path}")
    for step in reversed(steps):
        patch = {step: patch}
    return patch


def _join(a: dict[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Both patches as one, the later value winning; a part's bare word is kept under SHORT."""
    joined = dict(a)
    for name, value in b.items():
        old = joined.get(name)
        if isinstance(value, Mapping) and isinstance(old, str):
            old = {SHORT: old}
        joined[name] = _join(dict(old), value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return joined


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = importlib.resources.files("torchstone") / "recipes"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_recipe(
    source: str | Path | Mapping[str, Any],
    overrides: Iterable[str | Mapping[str, Any]] = (),
    changes: Changes | None = None,
    start: Callable[[str], Mapping[str, Any]] | None = None,
) -> Recipe:
    """A recipe from a built-in name, a YAML file or plain data, with overrides laid over it.

    Overrides are ``field.sub=value`` strings or nested mappings; their order does not matter unless two set one field.
    `start` gives, for the run of `init_from`, the fields that the recipe is laid over in turn.

    Raises:
        TorchstoneError: no such recipe, not YAML, an unknown field or kind, an illegal value or pair.
    """
    data: Any
    if isinstance(source, Mapping):
        data = dict(source)
    else:
        data = parse_yaml(_read(source), str(source))
        if data is None:
            data = {}
        if not isinstance(data, Mapping):
            raise TorchstoneError(f"{source}: a recipe is a mapping of fields, got {str(data)[:60]!r}")
    _check_plain(data, "", 0)
    patch: dict[str, Any] = {}
    for override in overrides:
        body = parse_override(override) if isinstance(override, str) else override
        _check_plain(body, "", 0)
        patch = _join(patch, body)
    document = merge(data, patch, Recipe, changes)
    if start is not None and isinstance(document.get("init_from"), str):
        document = merge(_of_kind(start(document["init_from"]), document.get("data")), document, Recipe)
    return validate(Recipe, document).adapted()


def _of_kind(body: Mapping[str, Any], data: Any) -> Mapping[str, Any]:
    """What a run gives, its tokenizer for the kind of data that the recipe asks for, if that kind has one."""
    asked = family_root("data").short(data) if isinstance(data, str) else data
    kind = asked.get("kind") if isinstance(asked, Mapping) else None
    if "data" not in body or not isinstance(kind, str):
        return body
    try:
        takes = "tokenizer" in resolve("data", kind).model_fields
    except TorchstoneError:  # validation says it in one sentence
        return body
    return {**body, "data": {**body["data"], "kind": kind}} if takes else body


_NESTED, _LARGEST = 32, 2**53
"""Levels of a recipe, and its largest whole number (the largest that JSON carries safely)."""


def _check_plain(data: Any, path: str, level: int) -> None:
    """Refuse what no field could take, before specs look at it.

    Raises:
        TorchstoneError: a key or a kind that is no word, a value that is no plain data, a number beyond all bounds.
    """
    here = path or "recipe"
    if level > _NESTED:
        raise TorchstoneError(f"{here[:200]}: nested deeper than {_NESTED} levels")
    if isinstance(data, Mapping):
        for name, value in data.items():
            if not isinstance(name, str) or not name.isprintable():
                raise TorchstoneError(f"{here}: the key {str(name)[:40]!r} is no word")
            inside = f"{path}.{name}" if path else name
            if name == "kind" and not isinstance(value, str):
                raise TorchstoneError(f"{inside}: needs the name of a kind, got {str(value)[:60]!r}")
            _check_plain(value, inside, level + 1)
    elif isinstance(data, list | tuple):
        for number, value in enumerate(data):
            _check_plain(value, f"{here}.{number}", level + 1)
    elif isinstance(data, int) and abs(data) > _LARGEST:
        raise TorchstoneError(f"{here}: {str(data)[:40]} is beyond any bound (2^53)")
    elif isinstance(data, str) and any("\ud800" <= letter <= "\udfff" for letter in data):
        raise TorchstoneError(f"{here}: the text {data[:40]!r} holds half of a surrogate pair")
    elif not isinstance(data, str | int | float | None):
        raise TorchstoneError(f"{here}: {type(data).__name__} is no plain data (text, numbers, lists, mappings)")


def _read(source: str | Path) -> str:
    path = Path(source)
    name = str(source)
    if len(name) > 4096:
        raise TorchstoneError(f"recipe {name[:40]!r}...: file name too long")
    if not path.suffix and re.fullmatch(r"[A-Za-z0-9_-]+", name) and not path.is_file():
        names = builtin_recipes()
        if name in names:
            return (importlib.resources.files("torchstone") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        raise TorchstoneError(
            f"no recipe {name!r}{nearest(name, names)}; built in: {', '.join(names)}; or give a YAML file"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TorchstoneError(f"{path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise TorchstoneError(f"{path}: {error.strerror or error}") from None
