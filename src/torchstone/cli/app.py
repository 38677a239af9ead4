"""The verbs. Each imports what it needs when it runs, so that help answers at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchstone.cli.groups import groups

if TYPE_CHECKING:
    from torchstone.generate import Completion

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Torchstone: Transformer methods as parts that combine, and claims that run.",
)
recipe_app = typer.Typer(no_args_is_help=True, help="Show recipes and their schema.")
app.add_typer(recipe_app, name="recipe")
scale_app = typer.Typer(no_args_is_help=True, help="Scaling laws: fit them to trainings, ask them what to train.")
app.add_typer(scale_app, name="scale")
for _name, _group in groups():
    app.add_typer(_group, name=_name)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...", help="Overrides; values are YAML.")]
Attention = Annotated[
    str, typer.Option("--attention", help="What a token sees of those before it: full, window:SIZE or blocks:SIZE.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]


def _version(value: bool) -> None:
    if value:
        from torchstone import __version__

        print(f"torchstone {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False))


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe (quickstart) or a YAML file.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="The run directory.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Train a recipe into a run directory."""
    from torchstone.errors import TorchstoneError
    from torchstone.train import train as run_training

    if out is None:
        raise TorchstoneError("train: needs --out, the directory of the run")
    if device is not None:
        overrides = [*(overrides or []), f"trainer.device={device}"]
    folder = run_training(recipe, overrides or [], out=out, resume=resume, quiet=quiet)
    print(folder.path)


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", help="Text to continue; may be given several times. Without it, standard input or nothing."
        ),
    ] = None,
    suffix: Annotated[
        list[str] | None,
        typer.Option("--suffix", help="What follows the prompt: write what stands between; one for each prompt."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens to write at most.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; by default what the run's settings say.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k best tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the best tokens that hold this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the best one's.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 makes repetition less likely.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End before this text; may be given several times.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling noise.")] = 0,
    noise: Annotated[
        str | None, typer.Option(help="Where randomness comes from: a kind, or {kind: lads, key_file: ...}.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="Who asks, for noise that goes by user.")] = None,
    attention: Attention = "full",
    echo: Annotated[bool, typer.Option("--echo", help="Print prompt and suffix around what is written.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    compile: Annotated[str, typer.Option(help="auto, on or off.")] = "auto",
    cache_bits: Annotated[int | None, typer.Option(help="Hold growing caches in 4 to 8 bits a number; lossy.")] = None,
    draft: Annotated[
        str | None, typer.Option(help="mtp: the model's predictors draft tokens; the same text in fewer forwards.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write text with a trained model: the text on stdout, all else on stderr."""
    from torchstone.api import load
    from torchstone.generate import Engine, Sampling
    from torchstone.generate.infilling import infilling_prompts
    from torchstone.generate.noise import noise_for
    from torchstone.recipe import parse_override
    from torchstone.spec import validate

    prompts = list(prompt) if prompt else ["" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()]
    folder = load(run)
    given = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop or [],
        "seed": seed,
    }
    settings = Sampling.of_settings(folder.generation_settings())
    asked = {name: value for name, value in given.items() if value is not None}
    options = validate(Sampling, {**settings, **asked}, "generate")
    engine = Engine.of_run(
        folder,
        device=device,
        precision=precision,
        compile=compile,
        cache_bits=cache_bits,
        attention=attention,
        draft=draft,  # type: ignore[arg-type]
    )
    asked_of: Any = prompts
    if suffix is not None:
        asked_of = infilling_prompts(folder, engine.tokenizer, prompts, suffix, options.max_new_tokens)
    after = [""] * len(prompts) if suffix is None else suffix
    asked_noise = None
    if noise is not None:
        asked_noise = parse_override(f"noise={noise}")["noise"]
        engine.check(asked_of, options)
    # last, because it counts the visit
    source, names = noise_for(asked_noise, prompts, user, options.greedy, once=True)
    if not as_json and len(prompts) == 1:
        if echo:
            print(prompts[0], end="", flush=True)
        for event in engine.stream(asked_of, options, requests=names, noise=source):
            print(event.text, end="", flush=True)
        print(after[0] if echo else "")
    else:
        done = engine.generate(asked_of, options, requests=names, noise=source)
        if as_json:
            _print_json(
                [
                    _completion(text, end if suffix else None, each, draft is not None)
                    for text, end, each in zip(prompts, after, done, strict=True)
                ]
            )
        else:
            for text, end, each in zip(prompts, after, done, strict=True):
                print(text + each.text + end if echo else each.text)
    if draft is not None:
        share = f" ({engine.accepted / engine.drafted:.1%})" if engine.drafted else ""
        print(f"draft {draft}: {engine.accepted:,} of {engine.drafted:,} tokens accepted{share}", file=sys.stderr)


def _completion(prompt: str, suffix: str | None, done: Completion, drafted: bool) -> dict[str, Any]:
    after = {} if suffix is None else {"suffix": suffix}
    counts = {"drafted": done.drafted, "accepted": done.accepted} if drafted else {}
    return {"prompt": prompt, **after, "text": done.text, "ids": done.ids, "finish": done.finish, **counts}


@app.command()
def compare(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe or a YAML file.")],
    axes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FIELD=A,B,...]...", help="Axes; a single value is an override for all."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The comparison's folder; continued if it was begun.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of every variant.")] = 5,
    variants: Annotated[Path | None, typer.Option("--variants", help="YAML: name -> fields, instead of axes.")] = None,
    jobs: Annotated[int, typer.Option(help="Cells trained at once.")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="Train cells on a Ray cluster (extra dist).")] = False,
    match: Annotated[str, typer.Option(help="none, parameters, flops or wall.")] = "none",
    match_tolerance: Annotated[float, typer.Option(help="Difference of size that may stay.")] = 0.01,
    tune: Annotated[str | None, typer.Option(help="FIELD=A,B,C: a grid for every variant, on other seeds.")] = None,
    tuning_seeds: Annotated[int, typer.Option(help="Seeds of the grid.")] = 1,
    margin: Annotated[float, typer.Option(help="What counts as equivalent, as a share of the reference.")] = 0.005,
    budget: Annotated[
        str | None, typer.Option(help="Time for all, as in 90s, 30m, 2h: cuts steps, never seeds.")
    ] = None,
    budgets: Annotated[str, typer.Option(help="Factors on the steps, as in 1,2,4: shows the trend.")] = "1",
    metric: Annotated[str | None, typer.Option(help="Name of the number compared.")] = None,
    higher_is_better: Annotated[bool, typer.Option("--higher-is-better", help="Direction of --metric.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only estimate the cost.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train variants under the same seeds and say which is better, by how much, how sure, at what cost."""
    from dataclasses import asdict

    from torchstone import api
    from torchstone.compare import Estimate
    from torchstone.compare.options import grid_of, numbers_of, one_of, seconds_of
    from torchstone.errors import TorchstoneError

    if out is None:
        raise TorchstoneError("compare: needs --out, the comparison's folder")
    result = api.compare(
        (axes or []) if variants is None else variants,
        seeds,
        recipe=recipe,
        overrides=(axes or []) if variants is not None else (),
        out=out,
        jobs=jobs,
        match=one_of("--match", match, ("none", "parameters", "flops", "wall")),  # type: ignore[arg-type]
        match_tolerance=match_tolerance,
        tune=None if tune is None else dict([grid_of(tune)]),
        tuning_seeds=tuning_seeds,
        margin=margin,
        budget=None if budget is None else seconds_of(budget),
        budgets=numbers_of("--budgets", budgets),
        metric=metric,
        higher_is_better=higher_is_better,
        ray=ray,
        dry_run=dry_run,
    )
    if isinstance(result, Estimate):
        if as_json:
            _print_json(asdict(result))
        else:
            print(result)
    elif as_json:
        _print_json(result.to_dict())
    else:
        print(result.table)
        print(f"report: {out / 'report.html'}", file=sys.stderr)


@app.command()
def papers(
    query: Annotated[str | None, typer.Argument(help="A slug, or words to search for.")] = None,
    as_json: AsJson = False,
) -> None:
    """List papers and what was found of their claims; with a slug, show one."""
    from torchstone.papers import find_paper, search_papers, slugs
    from torchstone.papers._pages import describe, listing

    one = query in slugs()
    found = [find_paper(query)] if one and query is not None else search_papers(query)
    if as_json:
        _print_json([describe(paper) for paper in found])
    elif one:
        print(listing(found[0]))
    else:
        for paper in found:
            states = ", ".join(f"{claim['id']}: {claim['state']}" for claim in describe(paper)["claims"])
            print(f"{paper.slug:<22} {paper.year}  {paper.title}  [{states}]")
        if not found:
            print(f"no paper matches {query!r}", file=sys.stderr)


@app.command()
def reproduce(
    slug: Annotated[str | None, typer.Argument(help="A paper; `torchstone papers` lists them.")] = None,
    claim: Annotated[str | None, typer.Option("--claim", help="Only this claim.")] = None,
    scale: Annotated[str, typer.Option(help="quick (no verdict is kept), evidence or gpu.")] = "quick",
    record: Annotated[bool, typer.Option("--record", help="Write the evidence.")] = False,
    every: Annotated[bool, typer.Option("--all", help="All papers, shortest claims first.")] = False,
    budget: Annotated[str | None, typer.Option(help="With --all: the time it may take, as in 30m.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where cells, JSON and plot go; can be continued.")] = None,
    jobs: Annotated[int, typer.Option(help="Cells trained at once.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Run the claims of a paper and say for each whether it holds here."""
    from torchstone import api
    from torchstone.compare.options import one_of, seconds_of
    from torchstone.errors import TorchstoneError
    from torchstone.papers._pages import run_all_papers, text_of

    size = one_of("--scale", scale, ("quick", "evidence", "gpu"))
    if every == (slug is not None):
        raise TorchstoneError("reproduce: needs a paper, or --all")
    if every:
        if claim is not None or record or out is not None:
            raise TorchstoneError("reproduce: --all takes no --claim and no --out, and records nothing")
        reports = run_all_papers(size, None if budget is None else seconds_of(budget), jobs)  # type: ignore[arg-type]
    else:
        assert slug is not None
        reports = [api.reproduce(slug, claim=claim, scale=size, record=record, out=out, jobs=jobs)]  # type: ignore[arg-type]
    if as_json:
        _print_json(reports if every else reports[0])
    else:
        print("\n\n".join(text_of(report) for report in reports))


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(help="A folder with config.json and safetensors, an id on the hub, or a file of torch.save."),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="The run directory.")] = None,
    layout: Annotated[str | None, typer.Option(help="Layout of a file (torchscale-decoder, ...).")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file with the config of a file.")] = None,
) -> None:
    """Read a checkpoint in a published layout into a run directory."""
    from torchstone.api import import_run
    from torchstone.errors import TorchstoneError

    if out is None:
        raise TorchstoneError("import: needs --out, the directory of the run")
    print(import_run(source, out=out, layout=layout, config=config).path)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write; not there yet, or empty.")],
    to: Annotated[
        str, typer.Option("--to", help="hf, a layout (llama, bert, ...), torchstone, peft or packed.")
    ] = "hf",
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; by default that of the run.")] = None,
) -> None:
    """Write a run in another library's form, or pack a run of bitlinear projections."""
    from torchstone.api import load

    layout = load(run).export(out, to, dtype)
    print(f"layout {layout}", file=sys.stderr)
    print(out)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="Perplexity and bits per byte of a file, a folder, a glob or standard input (-)."),
    ] = None,
    multiple_choice: Annotated[
        list[str] | None,
        typer.Option("--multiple-choice", help="Accuracy on a JSONL file of prompt, choices and answer."),
    ] = None,
    classification: Annotated[
        list[str] | None, typer.Option("--classification", help="Accuracy on a JSONL file of text and label.")
    ] = None,
    minimal_pairs: Annotated[
        list[str] | None,
        typer.Option("--minimal-pairs", help="Accuracy on a JSONL file of sentence_good and sentence_bad."),
    ] = None,
    infilling: Annotated[
        list[str] | None,
        typer.Option(
            "--infilling",
            help="Exact matches in a JSONL file of prefix, middle and suffix, or of a line of each text left out.",
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option("--tasks", help="Tasks of lm-evaluation-harness, with commas between (extra eval).")
    ] = "",
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="A folder with task files of your own.")
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", help="Tokens read at once; by default the model's context.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", help="Tokens from window to window; by default half a window.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", help="Instead of perplexity: bits per byte of text by tokens read, as in 128,256."),
    ] = None,
    last: Annotated[
        int | None, typer.Option("--last", help="With --lengths: tokens scored; by default half the shortest.")
    ] = None,
    attention: Attention = "full",
    limit: Annotated[int | None, typer.Option("--limit", help="Documents or items of each source at most.")] = None,
    batch: Annotated[int, typer.Option("--batch", help="Sequences that the model reads at once.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    out: Annotated[Path | None, typer.Option("--out", help="Write the report to this file as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a run: perplexity, bits per byte and accuracies, each with its 95 % confidence interval."""
    from torchstone.api import load
    from torchstone.compare.options import whole_numbers_of
    from torchstone.evaluate import report

    folder = load(run)
    results = folder.evaluate(
        text=text or (),
        multiple_choice=multiple_choice or (),
        classification=classification or (),
        minimal_pairs=minimal_pairs or (),
        infilling=infilling or (),
        tasks=[name.strip() for name in tasks.split(",") if name.strip()],
        include_path=include_path,
        window=window,
        stride=stride,
        lengths=() if lengths is None else whole_numbers_of("--lengths", lengths),
        last=last,
        attention=attention,
        limit=limit,
        device=device,
        precision=precision,
        batch=batch,
        out=out,
        quiet=False,
    )
    if as_json:
        _print_json(report(folder, results))
        return
    for result in results:
        for line in result.lines():
            print(line)


@app.command()
def harvest(
    crawl: Annotated[
        list[str] | None, typer.Argument(metavar="CRAWL...", help="JSON lines of pages: files, folders, globs.")
    ] = None,
    seed: Annotated[str | None, typer.Option("--seed", help="JSON lines of some pages of the topic.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where the collected pages go, as JSON lines.")] = None,
    patterns: Annotated[
        Path | None,
        typer.Option("--patterns", help="JSON: host -> url patterns of the topic; without it they are proposed."),
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write what each round did to this file.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of training, scoring and joining.")] = 3,
    keep: Annotated[float, typer.Option(help="Share of the crawl that a round keeps, by score.")] = 0.05,
    domain_threshold: Annotated[float, typer.Option(help="A domain is of the topic above this collected share.")] = 0.1,
    pattern_threshold: Annotated[float, typer.Option(help="A prefix is proposed above this collected share.")] = 0.5,
    tokenizer: Annotated[
        str, typer.Option(help="A run's folder or a tokenizer.json; bpe learns one from the first round's texts.")
    ] = "bpe",
    url_field: Annotated[str, typer.Option(help="Field that holds the address.")] = "url",
    text_field: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    lr: Annotated[float, typer.Option(help="Learning rate of the classifier.")] = 0.1,
    epochs: Annotated[int, typer.Option(help="Epochs of the classifier.")] = 3,
    random_seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Collect pages of a topic from a crawl, round by round, from a few pages of it."""
    import os

    from torchstone.data.harvest import HarvestSpec
    from torchstone.data.harvest import harvest as collect
    from torchstone.errors import TorchstoneError
    from torchstone.spec import validate

    if not crawl or seed is None or out is None:
        raise TorchstoneError("harvest: needs files of a crawl, --seed, pages of the topic, and --out, a file")
    given = {
        "rounds": rounds,
        "keep": keep,
        "domain_threshold": domain_threshold,
        "pattern_threshold": pattern_threshold,
        "tokenizer": {"kind": "file", "path": tokenizer} if os.path.exists(tokenizer) else tokenizer,
        "url": url_field,
        "text": text_field,
        "lr": lr,
        "epochs": epochs,
        "seed": random_seed,
    }
    spec = validate(HarvestSpec, given, "harvest")
    told = collect(crawl, seed, out, spec, patterns, report, say=lambda text: print(text, file=sys.stderr))
    if as_json:
        _print_json(told)
    else:
        print(out)


@app.command()
def inspect(
    what: Annotated[str, typer.Argument(help="A built-in recipe, a YAML file, a run directory or a preset (gpt2).")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Count parameters, decode state, arithmetic, energy and training memory, without making the model."""
    from torchstone.api import inspect as count

    result = count(what, overrides or [])
    if as_json:
        _print_json(result)
        return
    for name, value in result.items():
        if isinstance(value, dict):
            for part, size in value.items():
                unit = f"{size:,.0f} pJ" if name == "energy_per_token" else None
                shown = "unknown" if size is None else unit or f"{size / 2**20:,.1f} MiB"
                print(f"{name}.{part:<12} {shown}")
        else:
            shown = f"{value:,.0f}" if isinstance(value, int | float) else value
            print(f"{name:<24} {shown}")


@app.command()
def parts(
    family: Annotated[str | None, typer.Argument(help="Only this family.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the parts: fields, defaults, bounds, what each is, its paper."""
    from torchstone.cli.catalogue import catalogue

    entries = catalogue(family)
    if as_json:
        _print_json(entries)
        return
    for entry in entries:
        paper = f"  [{entry['paper']}]" if entry["paper"] else ""
        print(f"{entry['family']}.{entry['kind']}: {entry['summary']}{paper}")
        for name, field in entry["fields"].items():
            bounds = f", {field['bounds']}" if field["bounds"] else ""
            print(f"    {name} ({field['type']}, default {field['default']}{bounds}): {field['description']}")


@recipe_app.command("show")
def recipe_show(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe or a YAML file.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print the whole recipe with its defaults filled in."""
    from torchstone.recipe import load_recipe
    from torchstone.spec import Changes

    changes = Changes()
    resolved = load_recipe(recipe, overrides or [], changes)
    for line in changes.lines:
        print(line, file=sys.stderr)
    if as_json:
        _print_json(resolved.dump())
    else:
        print(resolved.yaml(), end="")


@recipe_app.command("schema")
def recipe_schema() -> None:
    """Print the JSON schema of recipes, with every kind of every family."""
    from torchstone.recipe import Recipe
    from torchstone.spec import json_schema

    _print_json(json_schema(Recipe))


@scale_app.command("fit")
def scale_fit(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SOURCE|FIELD=VALUE]...",
            help="Runs, folders of runs, files of JSON objects a line; with --recipe, overrides of it.",
        ),
    ] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help="Train a sweep of this recipe.")] = None,
    budgets: Annotated[
        str, typer.Option(help="With --recipe: FLOPs without embedding, as in 1e12,2e12,4e12,8e12.")
    ] = "",
    sizes: Annotated[str, typer.Option(help="With --recipe: WIDTH or WIDTHxDEPTH, as in 32x2,48x2,64x3.")] = "",
    lr: Annotated[str | None, typer.Option("--lr", help="With --recipe: a grid of peak learning rates.")] = None,
    batch: Annotated[str | None, typer.Option("--batch", help="With --recipe: a grid of sequences a batch.")] = None,
    seeds: Annotated[int, typer.Option(help="With --recipe: seeds of every cell, averaged.")] = 1,
    jobs: Annotated[int, typer.Option(help="With --recipe: cells trained at once.")] = 1,
    bootstrap: Annotated[int, typer.Option(help="Draws for intervals.")] = 200,
    out: Annotated[Path | None, typer.Option("--out", help="Where scaling.json, plots and a sweep's cells go.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fit loss, batch size, learning rate, model scale and tokens as power laws of compute, and predict the largest."""
    from torchstone.compare.sweep import read_points, sizes_of, sweep
    from torchstone.errors import TorchstoneError
    from torchstone.evaluate.scaling import fit
    from torchstone.evaluate.scaling_report import text_of, write_report

    if bootstrap < 0 or jobs < 1 or seeds < 1:
        raise TorchstoneError("scale fit: --jobs and --seeds are 1 or more, --bootstrap 0 or more")
    if out is not None and out.is_file():
        raise TorchstoneError(f"{out}: is a file, not a folder")
    if recipe is None:
        if budgets or sizes or lr or batch:
            raise TorchstoneError("scale fit: --budgets, --sizes, --lr and --batch need --recipe, what is swept")
        if not sources:
            raise TorchstoneError("scale fit: needs runs or files of trainings, or --recipe to train a sweep")
        points = read_points(sources)
    else:
        from torchstone.compare.options import numbers_of, whole_numbers_of
        from torchstone.compare.sweep import Grid
        from torchstone.recipe import load_recipe

        if out is None:
            raise TorchstoneError("scale fit: --recipe needs --out, the sweep's folder")
        grid = Grid(
            numbers_of("--budgets", budgets),
            sizes_of(sizes),
            () if lr is None else numbers_of("--lr", lr),
            () if batch is None else whole_numbers_of("--batch", batch),
            tuple(range(seeds)),
        )
        points = sweep(load_recipe(recipe, sources or []), grid, out, jobs)
    found = fit(points, bootstrap)
    if out is not None:
        write_report(found, out)
    if as_json:
        _print_json(found.to_dict())
    else:
        print(text_of(found))


@scale_app.command("suggest")
def scale_suggest(
    flops: Annotated[float, typer.Option("--flops", help="Compute C = M D, without embedding and head.")],
    laws: Annotated[
        Path | None, typer.Option(help="A scaling.json of `scale fit`, instead of DeepSeek's laws.")
    ] = None,
    block: Annotated[int, typer.Option(help="Tokens of a sequence, for the example of a model.")] = 4096,
    as_json: AsJson = False,
) -> None:
    """Say what learning rate, batch, model scale and tokens a budget asks for."""
    from dataclasses import asdict

    from torchstone.errors import TorchstoneError
    from torchstone.evaluate.scaling import DEEPSEEK, closed_form, read_laws, shape_near, suggest

    if block < 1:
        raise TorchstoneError("scale suggest: --block is 1 or more")
    found = suggest(flops, DEEPSEEK if laws is None else read_laws(laws))
    shape = None if found.flops_per_token is None else shape_near(found.flops_per_token, block)
    if as_json:
        _print_json({**asdict(found), "example": shape and {"depth": shape[0], "width": shape[1], "block": block}})
        return
    for name, value, unit in (
        ("learning rate", found.lr, ""),
        ("batch", found.batch, " tokens"),
        ("model scale M", found.flops_per_token, " FLOPs/token"),
        ("tokens D", found.tokens, ""),
    ):
        print(f"{name:<14} {'no law' if value is None else f'{value:.4g}{unit}'}")
    if shape is not None:
        depth, width = shape
        size = closed_form(depth, width, block)
        print(f"{'example':<14} depth {depth}, width {width}, block {block}: {size:.4g} FLOPs/token")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is here: versions, devices, threads, compiler, and what is missing for which extra."""
    from torchstone.cli.doctor import examine

    report = examine()
    if as_json:
        _print_json(report)
        return
    for name, value in report.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for part, state in value.items():
                print(f"    {part:<14} {state}")
        else:
            print(f"{name:<12} {value}")
