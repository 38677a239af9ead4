"""``torchstone rl sample``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["main"]

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")]


def main(
    run: Annotated[Path, typer.Argument(help="A run directory: whose model answers.")],
    prompts: Annotated[Path, typer.Argument(help="JSON lines with a field for the prompt.")],
    out: Annotated[Path, typer.Option("--out", help="File of trajectories, JSON lines.")],
    n: Annotated[int, typer.Option("--n", help="Answers to each prompt.")] = 8,
    reward: Annotated[
        list[str] | None, typer.Option("--reward", help="A rule: a kind, or YAML; else those of the run's training.")
    ] = None,
    field: Annotated[str | None, typer.Option(help="The field that holds the prompt.")] = None,
    template: Annotated[str | None, typer.Option(help="Text around a prompt, which stands at {prompt}.")] = None,
    limit: Annotated[int | None, typer.Option(help="Prompts, at most.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer, at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Scores are divided by it.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the fewest best tokens that hold this.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k best tokens.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    as_json: _Json = False,
) -> None:
    """Answer prompts several times, score the answers and write them down."""
    from torchstone.rl.dumps import sample as work
    from torchstone.train.run import RunFolder

    found = work(
        RunFolder(run),
        prompts,
        out,
        count=n,
        rewards=reward or (),
        field=field,
        template=template,
        limit=limit,
        seed=seed,
        batch=batch,
        device=device,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
    )
    _print(found, as_json)


def _print(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    flat = {**found, **{f"reward {name}": value for name, value in found.get("rewards", {}).items()}}
    for name, value in flat.items():
        if not isinstance(value, dict):
            print(f"{name:<24} {value:.4f}" if isinstance(value, float) else f"{name:<24} {value}")
