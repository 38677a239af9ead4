"""`train`: a recipe becomes a run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchstone.data import Tokenizer
from torchstone.errors import TorchstoneError
from torchstone.files import read_json
from torchstone.keys import Key
from torchstone.model.carry import carry_of
from torchstone.model.measure import Measures, measure
from torchstone.model.position import Position
from torchstone.model.site import parameter_name
from torchstone.objectives import Facts, Objective
from torchstone.ops.compiler import compiler_works
from torchstone.recipe import Recipe, load_recipe
from torchstone.spec import Changes
from torchstone.train.checkpoint import TensorFile
from torchstone.train.engine import Source, Split, Trainer
from torchstone.train.environment import BITWISE, autocast, choose_device, choose_precision, choose_threads, environment
from torchstone.train.mesh import Mesh, build_mesh
from torchstone.train.migrations import FORMAT_VERSION
from torchstone.train.progress import plot_curve
from torchstone.train.run import RunFolder, build_model, load_weights

__all__ = ["MAY_CHANGE", "compile_model", "make_trainer", "sizes_of", "train"]

MAY_CHANGE = (
    "trainer.log_every",
    "trainer.save_every",
    "trainer.keep_last",
    "trainer.keep_best",
    "trainer.device",
    "trainer.threads",
    "trainer.compile",
    "trainer.tensorboard",
    "trainer.steps",
    "evaluate.",
)
"""Fields in which a resumed recipe may differ from the run's."""


def train(
    recipe: Recipe | str | Path | Mapping[str, Any],
    overrides: Iterable[str | Mapping[str, Any]] = (),
    *,
    out: str | Path,
    resume: bool = False,
    quiet: bool = False,
) -> RunFolder:
    """Train a recipe into a run directory.

    Args:
        recipe: a recipe, a built-in name, a YAML file or plain data.
        overrides: ``field.sub=value`` strings or nested mappings.
        out: the run directory; it must not hold a run, unless resuming.
        resume: go on from the newest checkpoint of `out`, bit for bit; start if there is none.
        quiet: no progress on stderr.

    Raises:
        TorchstoneError: bad input, said in a sentence before anything is written; or a training that went wrong.
        Stopped: a signal came, and a checkpoint was written.
    """
    say = (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))
    folder, changes = RunFolder(out), Changes()
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides, changes, lambda run: RunFolder(run).start())
    else:
        overrides = list(overrides)
        recipe = load_recipe(recipe.dump(), overrides, changes) if overrides else recipe.adapted()
    going_on, checkpoint = resume and folder.exists(), None
    if going_on:
        recipe = _keep_choices(recipe, folder.recipe)
        _check_same(recipe, folder)
        checkpoint = folder.checkpoints().load()
        _check_steps(recipe, folder.recipe, 0 if checkpoint is None else checkpoint.step)
    else:
        folder.check_free()
    if recipe.init_from is not None and checkpoint is None:
        RunFolder(recipe.init_from).require()
    made = _assemble(recipe, folder, quiet, say, checkpoint, going_on, changes.lines)
    recipe, trainer, prepared, costs, facts, writer = (
        made.recipe,
        made.trainer,
        made.prepared,
        made.costs,
        made.facts,
        made.writer,
    )
    mesh, device, threads, block = trainer.mesh, trainer.device, facts["threads"], getattr(recipe.data, "block", None)
    if going_on:
        _warn_bitwise(folder, facts, say)
        if checkpoint is not None:
            trainer.restore(checkpoint)
        if mesh.first:
            folder.trim_metrics(trainer.step if checkpoint is not None else -1)
            folder.begin(recipe, prepared.tokenizer, facts, getattr(prepared, "names", None))
            if checkpoint is not None:  # a kill may have come between the checkpoint and its publication
                folder.publish(folder.state / checkpoint.name)
        if checkpoint is not None and trainer.step >= recipe.trainer.steps:
            say(f"{folder.path}: finished at step {trainer.step}; nothing left to train")
        else:
            say(f"{folder.path}: going on from step {trainer.step}")
    elif mesh.first:
        folder.begin(recipe, prepared.tokenizer, facts, getattr(prepared, "names", None))
    mesh.barrier()
    trainer.rows = folder.metrics()
    if mesh.first and writer is not None:
        trainer.tensorboard = writer(str(folder.path / "tensorboard"))
    unit = "examples" if block is None else f"x {block} tokens"
    say(
        f"model: {costs.parameters:,} parameters, {costs.active_parameters:,} active; "
        f"{recipe.trainer.steps:,} steps of {_rows(recipe, mesh):,} {unit} on {device.type}, "
        f"{threads} threads, {recipe.trainer.precision}, compile {facts['compile']}"
    )
    try:
        trainer.fit()
    finally:
        if mesh.first and trainer.rows:
            plot_curve(folder.metrics(), folder.path / "plots" / "learning_curve.png", folder.path.name)
        if trainer.tensorboard is not None:
            trainer.tensorboard.close()
    return folder


@dataclass(frozen=True)
class _Made:
    """Everything that a recipe becomes before the first step."""

    recipe: Recipe
    trainer: Trainer
    prepared: Any
    costs: Measures
    facts: dict[str, Any]
    writer: Any


def _assemble(
    recipe: Recipe,
    folder: RunFolder | None,
    quiet: bool,
    say: Callable[[str], None],
    checkpoint: Any = None,
    going_on: bool = False,
    lines: Sequence[str] = (),
) -> _Made:
    """The trainer of a recipe, whose run directory (if it has one) is not touched yet."""
    threads = choose_threads(recipe.trainer.threads)
    torch.set_num_threads(threads)
    device = choose_device(recipe.trainer.device)
    mesh = build_mesh(recipe.parallel, device)
    prepared = recipe.data.prepare(say if mesh.first else None)
    recipe = _resolve(recipe, prepared, threads, choose_precision(recipe.trainer.precision, device))
    objective = _objective(recipe, facts_of(prepared, recipe))
    if going_on:
        assert folder is not None
        _check_corpus(folder, prepared.hash)
    model = build_model(recipe.model, None if checkpoint is not None else recipe.trainer.seed, device)
    if checkpoint is None and recipe.init_from is not None:
        say(_start_from(RunFolder(recipe.init_from), model, recipe))
    if recipe.adapt is not None:
        recipe.adapt.prepare(model)
    for stack in getattr(model, "stacks", {}).values():
        stack.recompute = recipe.trainer.recompute
    costs = measure(model, getattr(recipe.data, "block", 1))
    _rehearse(model, objective, prepared.train, recipe, device, mesh)
    for line in (*lines, prepared.description):
        say(line)
    compiled = _compile(model, recipe, costs.flops_per_token, say)
    facts = environment(device, threads, compiled, mesh.ranks) | {"corpus": prepared.hash}
    writer = _tensorboard(recipe)
    trainer = Trainer(
        model,
        objective,
        Source(prepared.train, prepared.valid, prepared.test),
        recipe.optimizer,
        recipe.schedule,
        recipe.trainer,
        recipe.evaluate,
        device,
        mesh,
        folder,
        {"recipe": recipe.hash(), "format_version": FORMAT_VERSION},
        costs.flops_per_token,
        quiet,
        adapt=recipe.adapt,
    )
    return _Made(recipe, trainer, prepared, costs, facts, writer)


def make_trainer(recipe: Recipe) -> tuple[Trainer, Recipe]:
    """The trainer of a recipe, in memory, and the recipe with what data and machine decide filled in.

    Raises:
        TorchstoneError: bad input.
    """
    made = _assemble(recipe.adapted(), None, True, lambda text: None)
    return made.trainer, made.recipe


def _start_from(source: RunFolder, model: nn.Module, recipe: Recipe) -> str:
    """Put the weights of a run into the model; says which parameters are not from there.

    What `adapt` adds is new, and so is the head where it is of another kind or size.

    Position tables may be made from the run's in ways of their own (`Position.adopt`). A norm after the last layer that
    the model has not, as one whose head has the norm, stays behind.

    Raises:
        TorchstoneError: the run has no weights, or those of another model.
    """
    file = TensorFile(source.path / "model.safetensors")
    mine, theirs = getattr(recipe.model, "head", None), getattr(source.model_spec, "head", None)
    own = {parameter_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    other = mine != theirs
    added = recipe.adapt.is_new if recipe.adapt is not None else lambda name: False

    def of_head(name: str) -> bool:
        return other and name.startswith("head.")

    tables = {name: file.get(name) for name in file.shapes if ".positions." in name}
    adopted: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, Position):
            for name, _ in module.named_parameters(recurse=False):
                value = module.adopt(full := parameter_name(f"{path}.{name}"), tables)
                if value is not None:
                    adopted[full] = value

    def stays(name: str) -> bool:
        return of_head(name) or (other and name in ("encoder.norm.weight", "encoder.norm.bias"))

    load_weights(model, file, source.path, new=lambda name: added(name) or of_head(name) or name in adopted, left=stays)
    with torch.no_grad():
        for name, value in adopted.items():
            model.get_parameter(name).copy_(value)
    if recipe.adapt is not None:
        values = {parameter_name(name): parameter.detach() for name, parameter in model.named_parameters()}
        for name, value in values.items():
            first = recipe.adapt.starts_from(name) if name not in file.shapes else None
            if first in values:
                value.copy_(values[first])
    new = [name for name, shape in own.items() if file.shapes.get(name) != shape and name not in adopted]
    return f"weights of {source.path}" + (
        f"; new: {', '.join(new[:4])}{', ...' if len(new) > 4 else ''}" if new else ""
    )


def _keep_choices(recipe: Recipe, before: Recipe) -> Recipe:
    """What the recipe leaves to the machine stays as the run's first machine chose it."""
    patch: dict[str, Any] = {}
    if recipe.trainer.threads is None:
        patch["threads"] = before.trainer.threads
    if recipe.trainer.precision == "auto":
        patch["precision"] = before.trainer.precision
    return recipe.override({"trainer": patch})


def _rows(recipe: Recipe, mesh: Mesh) -> int:
    return recipe.trainer.batch * recipe.trainer.accumulate * mesh.ranks


_OF_TOKENS = ("vocabulary", "mask", "pad", "separator")


def facts_of(prepared: Any, recipe: Recipe) -> Facts:
    """What an objective may know of prepared data and of other runs."""
    tokenizer, vocabulary = prepared.tokenizer, getattr(recipe.model, "vocabulary", None)
    special = {} if tokenizer is None else {name: getattr(tokenizer, name) for name in _OF_TOKENS}
    return Facts(
        **special,
        classes=getattr(prepared, "sizes", {}).get("classes"),
        init_from=recipe.init_from,
        model=recipe.model,
        load=lambda run: RunFolder(run).require().model(),
        frequencies=(lambda: _frequencies(prepared.train, vocabulary)) if vocabulary is not None else None,
        tokenizer=tokenizer,
        tokenizer_of=_tokenizer_of,
        rows=getattr(prepared, "rows", None),
    )


def _tokenizer_of(run: str) -> Tokenizer | None:
    folder = RunFolder(run)
    return folder.tokenizer() if (folder.path / "tokenizer.json").is_file() else None


_COUNTED = 1 << 16
"""Examples, at most, whose tokens are counted; of more, as many spread evenly."""


def _frequencies(split: Split, vocabulary: int) -> torch.Tensor:
    """How often each token is in a split, int64 (V,)."""
    count_V = torch.zeros(vocabulary, dtype=torch.int64)
    for batch in split.evaluation(256, _COUNTED):
        ids = batch["ids"][batch["valid"]] if "valid" in batch else batch["ids"]
        count_V += torch.bincount(ids.flatten(), minlength=vocabulary)
    return count_V


def _resolve(recipe: Recipe, prepared: Any, threads: int, precision: str) -> Recipe:
    """The recipe with what the data and the machine decide filled in."""
    tokenizer, known = prepared.tokenizer, sizes_of(recipe, prepared)
    given = {name: value for name in known if (value := getattr(recipe.model, name)) is not None}
    for name, value in given.items():
        if name != "context" and value < known[name]:
            whose = f"data {recipe.data.kind}" if tokenizer is None else "the tokenizer"
            raise TorchstoneError(f"model.{name}: {value} is fewer than {whose}'s {known[name]}")
    left = {name: size for name, size in known.items() if name not in given}
    return recipe.override({"trainer": {"threads": threads, "precision": precision}, "model": left})


def sizes_of(recipe: Recipe, prepared: Any) -> dict[str, int]:
    """The fields of the recipe's model that its prepared data decide where they are open."""
    tokenizer, block = prepared.tokenizer, getattr(recipe.data, "block", None)
    # data without text have a vocabulary of their own, and sizes by other names
    vocabulary = getattr(recipe.data, "vocabulary", None) if tokenizer is None else tokenizer.vocabulary
    sizes = {"vocabulary": vocabulary, "context": block, **getattr(prepared, "sizes", {})}
    return {name: size for name, size in sizes.items() if size is not None and name in type(recipe.model).model_fields}


def _objective(recipe: Recipe, facts: Facts) -> Objective:
    """The objective, keyed by the seed: modules that are not ours draw first values from torch's own generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Key(recipe.trainer.seed).fold("objective").value & (2**63 - 1))
        return recipe.objective.build(facts)


def _rehearse(
    model: nn.Module, objective: Objective, split: Split, recipe: Recipe, device: torch.device, mesh: Mesh
) -> None:
    """A small forward, so that what does not go together is said before anything is written.

    Raises:
        TorchstoneError: the objective, the data and the model do not go together.
    """
    objective.check(model)
    model.eval()
    objective.to(device).eval()
    batch = split.batch(Key(0), 0, min(2, recipe.trainer.batch))
    if mesh.ranks > 1 and "begins" in batch and carry_of(model, 1) is not None:
        raise TorchstoneError(
            f"parallel.data: is {mesh.ranks}, and what a model carries from step to step is kept on one rank only"
        )
    try:
        with torch.no_grad(), autocast(device, recipe.trainer):
            ready = objective.prepare({name: value.to(device) for name, value in batch.items()}, Key(0))
            ready = objective.collect(model, ready, Key(0))
            objective(model, objective.agree([ready], lambda x: x)[0], None)
    except KeyError as error:
        (column,) = error.args
        if column not in ("ids", "next", "pixels", "label") or column in batch:
            raise
        raise TorchstoneError(
            f"objective {recipe.objective.kind}: needs {column!r} of its examples, and data {recipe.data.kind} has "
            f"{', '.join(batch)}"
        ) from error
    model.train()
    objective.train()


def _check_same(recipe: Recipe, folder: RunFolder) -> None:
    """Refuse to go on with another training.

    Raises:
        TorchstoneError: names the fields that differ.
    """
    before = folder.recipe
    # what the data decide may stand open in the recipe and is filled in by `_resolve`
    same_kind = recipe.model.kind == before.model.kind
    fields = type(recipe.model).model_fields if same_kind else ()
    open_here = {name: getattr(before.model, name) for name in fields if getattr(recipe.model, name) is None}
    filled = {name: value for name, value in open_here.items() if isinstance(value, int)}
    same = recipe.override({"model": filled}) if filled else recipe
    differ = [field for field in same.differences(before) if not field.startswith(MAY_CHANGE)]
    if differ:
        raise TorchstoneError(f"{folder.path}: --resume needs the run's own recipe; different: {'; '.join(differ[:5])}")


def _check_corpus(folder: RunFolder, corpus: str) -> None:
    """Refuse to go on with another text.

    Raises:
        TorchstoneError: the corpus changed since the run began.
    """
    before = read_json(folder.path / "environment.json").get("corpus")
    if before is not None and before != corpus:
        raise TorchstoneError(
            f"{folder.path}: the corpus changed since the run began ({before[:12]} then, {corpus[:12]} now)"
        )


def _check_steps(recipe: Recipe, before: Recipe, done: int) -> None:
    """Refuse another number of steps where the steps already done would have had another learning rate.

    Raises:
        TorchstoneError: names the first such step.
    """
    old, new, factor = before.trainer.steps, recipe.trainer.steps, recipe.schedule.factor
    if old == new:
        return
    wrong = next((step for step in range(done) if factor(step, old) != factor(step, new)), None)
    if wrong is not None:
        raise TorchstoneError(
            f"trainer.steps: {new} cannot continue a run of {old}: under schedule {recipe.schedule.kind} the learning "
            f"rate would have differed from step {wrong + 1} on; a constant schedule can be extended"
        )


def _warn_bitwise(folder: RunFolder, facts: Mapping[str, Any], say: Callable[[str], None]) -> None:
    before = read_json(folder.path / "environment.json")
    differ = [
        f"{name} {before.get(name)} -> {facts.get(name)}" for name in BITWISE if before.get(name) != facts.get(name)
    ]
    if differ:
        say(f"resuming elsewhere ({', '.join(differ)}): losses will agree closely, not bit for bit")


def _compile(model: nn.Module, recipe: Recipe, flops: float, say: Callable[[str], None]) -> str:
    """Compile each block in place if the recipe and its shapes ask for it: "on" or "off", for the record."""
    trainer = recipe.trainer
    if trainer.compile == "off":
        return "off"
    if trainer.compile == "auto":
        tokens = trainer.steps * trainer.batch * trainer.accumulate * getattr(recipe.data, "block", 1)
        if tokens * flops < 2e15:  # what compiling costs is won back only by a training of some size
            return "off"
    reason = compiler_works()
    if reason is not None:
        say(f"torch.compile steps aside: {reason}")
        return "off"
    compile_model(model)
    return "on"


def compile_model(model: nn.Module) -> None:
    """Compile each block and final norm of a model in place (a model without blocks as a whole)."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    parts = [part for stack in getattr(model, "stacks", {}).values() for part in (*stack.layers, stack.norm)]
    for part in parts or [model]:
        part.compile()


def _tensorboard(recipe: Recipe) -> Any:
    """The class that writes events; None if the recipe wants none."""
    if not recipe.trainer.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TorchstoneError("trainer.tensorboard: needs the extra `track`: pip install 'torchstone[track]'") from None
    return SummaryWriter
