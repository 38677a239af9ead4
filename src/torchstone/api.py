"""The Python interface: what the command line calls, and what a notebook starts from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from torchstone.errors import TorchstoneError, nearest
from torchstone.model import ModelSpec
from torchstone.model.measure import energy, measure
from torchstone.model.stack.multi_token import predictors_of
from torchstone.recipe import Recipe, load_recipe
from torchstone.spec import Part, PartSpec, Spec, resolve, validate
from torchstone.train.run import RunFolder, build_model, shape_of
from torchstone.train.training import train as _train

if TYPE_CHECKING:
    from torchstone.compare import Estimate
    from torchstone.compare import Result as Comparison
    from torchstone.compare.match import Match
    from torchstone.evaluate import Result, Sources
    from torchstone.generate import Completion
    from torchstone.generate.noise import NoiseSource, NoiseSpec
    from torchstone.papers._claim import Scale

__all__ = ["Run", "build", "compare", "import_run", "inspect", "load", "reproduce", "train"]


class Run(RunFolder):
    """A finished or interrupted training: its files, its model, its text."""

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        suffix: str | Sequence[str] | None = None,
        device: str = "cpu",
        precision: str = "fp32",
        compile: str = "auto",
        cache_bits: int | None = None,
        attention: str = "full",
        draft: Literal["mtp"] | None = None,
        noise: str | Mapping[str, Any] | NoiseSpec | NoiseSource | None = None,
        user: str | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Continue each prompt.

        Args:
            prompts: one or several texts.
            suffix: what follows each; then what stands between is written (fill in the middle), by a model of pseudo
                masks exactly max_new_tokens tokens of it.
            device, precision, compile: where and how the model runs.
            cache_bits: bits a number that the growing caches are held in, 4 to 8; lossy. None: those of `precision`.
            attention: what a token sees of those before it: "full", "window:128", "blocks:64".
            draft: "mtp" drafts tokens with the predictors of stack multi_token: the same text in fewer forwards.
            noise: where randomness comes from, as "lads" or {"kind": "lads", "key_file": ...}, or a source, as
                `torchstone.generate.noise.lads.LadsNoise`; None goes by `seed`.
            user: who asks, for noise that goes by user.
            sampling: fields of `torchstone.generate.Sampling` (max_new_tokens, temperature, top_p, seed, ...), laid
                over what the run's generation_config.json sets.

        Raises:
            TorchstoneError: an unknown field, a prompt longer than the model's limit, no weights yet, a suffix for a
                run that has not learnt to fill in; noise that lacks a key, a file or the user; a user and no noise
                that goes by user.
        """
        from torchstone.generate import Engine, Sampling
        from torchstone.generate.infilling import infilling_prompts
        from torchstone.generate.noise import noise_for

        options = validate(Sampling, {**Sampling.of_settings(self.generation_settings()), **sampling}, "sampling")
        engine = Engine.of_run(
            self,
            device=device,
            precision=precision,
            compile=compile,
            cache_bits=cache_bits,
            attention=attention,
            draft=draft,
        )
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        asked: Any = texts
        if suffix is not None:
            suffixes = [suffix] if isinstance(suffix, str) else list(suffix)
            asked = infilling_prompts(self, engine.tokenizer, texts, suffixes, options.max_new_tokens)
        if noise is not None:
            engine.check(asked, options)
        # last, because it counts the visit
        source, names = noise_for(noise, texts, user, options.greedy)
        return engine.generate(asked, options, requests=names, noise=source)

    def evaluate(
        self,
        *,
        text: Sources = (),
        multiple_choice: Sources = (),
        classification: Sources = (),
        minimal_pairs: Sources = (),
        infilling: Sources = (),
        tasks: str | Sequence[str] = (),
        **options: Any,
    ) -> list[Result]:
        """Measure this run on texts, items and tasks; see `torchstone.evaluate.evaluate`, also for the `options`.

        Raises:
            TorchstoneError: bad input, a model that the task makes no sense for, no weights yet.
        """
        from torchstone.evaluate import evaluate

        return evaluate(
            self,
            text=text,
            multiple_choice=multiple_choice,
            classification=classification,
            minimal_pairs=minimal_pairs,
            infilling=infilling,
            tasks=tasks,
            **options,
        )

    def export(self, out: str | Path, to: str = "hf", dtype: str | None = None) -> str:
        """Write this run in another library's form; see `torchstone.interop.exporting.export_run`."""
        from torchstone.interop.exporting import export_run

        return export_run(self, out, to, dtype)


def import_run(
    source: str | Path,
    *,
    out: str | Path,
    layout: str | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
) -> Run:
    """Read a published checkpoint into a run; see `torchstone.interop.importing.import_run`."""
    from torchstone.interop.importing import import_run as read

    return Run(read(source, out, layout, config).path)


def load(path: str | Path) -> Run:
    """The run in a directory.

    Raises:
        TorchstoneError: there is none.
    """
    run = Run(path)
    run.require()
    return run


def train(
    recipe: Recipe | str | Path | Mapping[str, Any],
    overrides: Iterable[str | Mapping[str, Any]] = (),
    *,
    out: str | Path,
    resume: bool = False,
    quiet: bool = False,
) -> Run:
    """Train a recipe into a run directory; see `torchstone.train.training.train`."""
    return Run(_train(recipe, overrides, out=out, resume=resume, quiet=quiet).path)


class _Holder(Spec):
    model: Part[ModelSpec]


def build(
    spec: PartSpec | str | Mapping[str, Any],
    *,
    width: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    **more: Any,
) -> nn.Module:
    """A module from a spec, initialised.

    ``build(SoftmaxSpec(heads=4), width=64, position="rotary")`` is a part for somebody else's model, from (B, T, D) to
    (B, T, D); ``build({"width": 64, "vocabulary": 256})`` is a whole model; ``build("ffn.swiglu", width=64)`` names a
    kind, and `more` sets its fields; ``build("gpt2")`` is a published size with random weights.

    Raises:
        TorchstoneError: unknown kind or field, or sizes that do not go together.
    """
    from torchstone.model.alone import alone

    if isinstance(spec, str) and _is_preset(spec):
        from torchstone.interop.presets import preset

        spec = preset(spec)
    if isinstance(spec, str):
        family, _, kind = spec.partition(".")
        cls = resolve(family, kind)
        fields = {
            name: more.pop(name)
            for name in list(more)
            if name not in ("causal", "position", "context") or name in cls.model_fields
        }
        if family == "model" and width is not None:
            fields["width"] = width
        spec = validate(cls, fields, spec)
    elif isinstance(spec, Mapping):
        spec = validate(_Holder, {"model": spec}).model
    if isinstance(spec, ModelSpec):
        return build_model(spec, seed, device)
    if width is None:
        raise TorchstoneError(f"build: a part of family {spec.family} needs width=")
    return alone(spec, width, seed=seed, **more).to(device)


def compare(
    variants: Mapping[str, Any] | Sequence[str] | str | Path,
    seeds: int | Sequence[int] = 5,
    *,
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    jobs: int = 1,
    match: Match = "none",
    match_tolerance: float = 0.01,
    tune: Mapping[str, Sequence[float]] | None = None,
    tuning_seeds: int = 1,
    margin: float = 0.005,
    budget: float | None = None,
    budgets: Sequence[float] = (1.0,),
    metric: str | None = None,
    higher_is_better: bool = False,
    ray: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> Comparison | Estimate:
    """Train variants under the same seeds, batches and first values, and say which is better, by how much, how sure.

    Args:
        variants: name -> a function from a seed to metrics, or a recipe, or (with `recipe`) a patch on it; or, with
            `recipe`, axes as on the command line, ``["model.position=rotary,alibi"]``, or the path of a YAML file of
            named patches. The first is the reference.
        seeds: how many, or which.
        recipe: what patches and axes change.
        overrides: of all variants, as ``field=value``.
        out: the comparison's folder, in which it can be continued; None takes a temporary one.
        jobs: cells trained at once.
        match: "parameters" or "flops" sets the feed-forward width so that all variants are of one size, "wall" the
            steps so that all take one time.
        match_tolerance: difference of size that may stay, as a share.
        tune: one field and a grid that every variant is tuned over, by validation loss, on seeds of its own.
        tuning_seeds: how many of those.
        margin: what counts as equivalent, as a share of the reference's mean.
        budget: seconds that all may take; steps are cut, never seeds.
        budgets: factors on the steps: one comparison each, and the trend of the gap.
        metric: name of the number compared; by default bits per byte, or what a task measures.
        higher_is_better: direction of `metric`; accuracies have theirs.
        ray: train cells on a Ray cluster instead of in processes here.
        dry_run: only estimate the cost.
        quiet: no progress on stderr.

    Raises:
        TorchstoneError: fewer than two variants, one that cannot be built or matched, a folder with another comparison,
            a budget too small.
    """
    import tempfile

    from torchstone.compare import Metric, Options, compare_functions, compare_recipes, from_axes, from_file, from_patch

    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(int(seed) for seed in seeds)
    number = None if metric is None else Metric.of(metric, higher_is_better)
    if isinstance(variants, Mapping):
        functions = {name: value for name, value in variants.items() if callable(value)}
        if functions:
            if len(functions) != len(variants):
                raise TorchstoneError("compare: variants are all functions, or none is")
            return compare_functions(functions, chosen, number, margin)
        made = [
            from_patch(name, value, None, overrides) if recipe is None else from_patch(name, recipe, value, overrides)
            for name, value in variants.items()
        ]
    elif recipe is None:
        raise TorchstoneError("compare: axes need recipe=, what they change")
    elif isinstance(variants, str | Path):
        made = from_file(recipe, variants, overrides)
    else:
        made = from_axes(recipe, [*overrides, *variants])
    if tune is not None and len(tune) != 1:
        raise TorchstoneError(f"compare: tune takes one field and its grid, got {len(tune)}")
    options = Options(
        seeds=chosen,
        jobs=jobs,
        match=match,
        tolerance=match_tolerance,
        tune=None if tune is None else next((path, tuple(map(float, grid))) for path, grid in tune.items()),
        tuning_seeds=tuning_seeds,
        margin=margin,
        budget=budget,
        budgets=tuple(float(factor) for factor in budgets),
        metric=number,
        dry_run=dry_run,
        ray=ray,
    )
    say = (lambda text: None) if quiet else None
    if out is not None:
        return compare_recipes(made, out, options, say)
    with tempfile.TemporaryDirectory(prefix="torchstone-compare-") as folder:
        return compare_recipes(made, folder, options, say)


def reproduce(
    slug: str,
    *,
    claim: str | None = None,
    scale: Scale = "quick",
    record: bool = False,
    out: str | Path | None = None,
    jobs: int = 1,
) -> dict[str, Any]:
    """Run the claims of a paper and say for each whether it holds here.

    Args:
        slug: the paper's; `torchstone.papers.slugs` lists them.
        claim: only this one, by its id.
        scale: "quick" (a look of minutes, no verdict is kept), "evidence" or "gpu".
        record: write the evidence into the package.
        out: where cells, JSON and plot go, and from where they are continued.
        jobs: cells trained at once.

    Returns:
        ``paper``, ``scale`` and ``claims``; each claim has id, kind, text, verdict, gates, measured, margin, seeds and
        seconds.

    Raises:
        TorchstoneError: no such paper or claim, a quick look that was to be recorded, a claim that cannot run here.
    """
    from torchstone.papers._pages import run_paper

    return run_paper(slug, claim, scale, record, None if out is None else Path(out), jobs)


def inspect(
    what: str | Path | Recipe | Mapping[str, Any], overrides: Iterable[str | Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Counts of a recipe, a run or a preset, on the meta device: parameters, state, arithmetic, energy, memory.

    Raises:
        TorchstoneError: neither a run nor a recipe nor a preset.
    """
    recipe = _recipe_of(what, overrides)
    spec = recipe.model
    model = shape_of(spec)
    if recipe.adapt is not None:
        recipe.adapt.prepare(model)
    context: Any = getattr(spec, "context", None) or getattr(recipe.data, "block", 1024)
    dtype = torch.bfloat16 if recipe.trainer.precision == "bf16" else torch.float32
    predictors = predictors_of(model)
    if predictors is not None:  # no part of the main model: counted apart
        del model.decoder.predictors  # type: ignore[union-attr]
    counts = measure(model, context, dtype)
    from torchstone.train.memory import training_memory

    memory = training_memory(recipe)
    return {
        "model": spec.kind,
        **asdict(counts),
        "predictor_parameters": sum(p.numel() for p in predictors.parameters()) if predictors is not None else 0,
        "energy_per_token": asdict(energy(model, dtype)),
        "training_bytes": {**asdict(memory), "peak": memory.peak},
    }


def _is_preset(name: str) -> bool:
    """Whether this is the name of a published size, and of no recipe or file."""
    from torchstone.interop.presets import presets
    from torchstone.recipe import builtin_recipes

    return name in presets() and name not in builtin_recipes() and not Path(name).exists()


def _check_name(name: str) -> None:
    """Refuse a bare word that names neither a recipe nor a preset, with the presets that have it in their names."""
    from torchstone.interop.presets import presets
    from torchstone.recipe import builtin_recipes

    recipes = builtin_recipes()
    if not re.fullmatch(r"[\w.-]+", name) or name in recipes or Path(name).suffix in (".yaml", ".yml", ".json"):
        return
    if Path(name).exists():
        return
    near = [preset for preset in presets() if name.lower() in preset]
    found = f"; presets: {', '.join(near)}" if near else nearest(name, [*recipes, *presets()])
    raise TorchstoneError(f"no recipe, run or preset {name!r}{found}; or give a YAML file")


def _recipe_of(what: Any, overrides: Iterable[Any]) -> Recipe:
    if isinstance(what, str | Path) and Path(what).is_dir():
        recipe = RunFolder(what).require().recipe
        return load_recipe(recipe.dump(), overrides)
    if isinstance(what, Recipe):
        recipe = what.adapted()
    elif isinstance(what, str) and _is_preset(what):
        from torchstone.interop.presets import preset

        spec = preset(what)
        document = {"model": spec.dump(), "data": {"kind": "text", "block": min(spec.context or 1024, 1024)}}
        if spec.head.kind == "mlm":
            document["objective"] = {"kind": "masked_lm"}
        recipe = load_recipe(document, overrides)
    else:
        if isinstance(what, str):
            _check_name(what)
        recipe = load_recipe(what, overrides, start=lambda run: RunFolder(run).start())
    if recipe.data.example != "tokens":
        from torchstone.compare.cell import sized

        return sized(recipe)
    patch: dict[str, Any] = {}
    if getattr(recipe.model, "vocabulary", 0) is None:
        size = getattr(recipe.data, "vocabulary", None)
        if size is None:
            size = getattr(getattr(recipe.data, "tokenizer", None), "size", lambda: None)()
        if size is None:
            raise TorchstoneError("model.vocabulary: is not known before the tokenizer is; set it")
        patch["vocabulary"] = size
    if getattr(recipe.model, "context", 0) is None:
        patch["context"] = getattr(recipe.data, "block", 1024)
    return recipe.override({"model": patch}) if patch else recipe
