"""Files of facts, as ParaRel has them, and what a run knows of them: its knowledge neurons, relation by relation."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from torchstone.errors import TorchstoneError
from torchstone.files import read_json
from torchstone.interpret.knowledge_neurons import By, Fact, KnowledgeNeurons, Neuron, Unit
from torchstone.keys import Key
from torchstone.model.site import parameter_name
from torchstone.train.checkpoint import save_tensors
from torchstone.train.run import RunFolder

__all__ = ["examine", "read_facts", "text_of"]

_ERASED = 20
"""Neurons that erasing a relation empties, as published."""


def read_facts(path: Path) -> dict[str, dict[str, Fact]]:
    """Relation -> name -> fact, of ``{relation: {fact: [[prompt, answer, relation], ...]}}``.

    Raises:
        TorchstoneError: the file is none of these; says where.
    """
    data = read_json(path)
    found: dict[str, dict[str, Fact]] = {}
    if not isinstance(data, dict) or not data:
        raise TorchstoneError(f"{path}: needs an object of relations")
    for relation, facts in data.items():
        if not isinstance(facts, dict) or not facts:
            raise TorchstoneError(f"{path}: {relation}: needs an object of facts, of one at least")
        found[relation] = {}
        for name, rows in facts.items():
            here = f"{path}: {relation}: {name}"
            good = isinstance(rows, list) and rows and all(isinstance(row, list) and len(row) >= 2 for row in rows)
            if not good or not all(isinstance(text, str) for row in rows for text in row[:2]):
                raise TorchstoneError(f"{here}: needs a list of [prompt, answer, relation]")
            answers = {row[1] for row in rows}
            if len(answers) > 1:
                raise TorchstoneError(f"{here}: has several answers, {', '.join(sorted(answers))}")
            found[relation][name] = Fact(tuple(row[0] for row in rows), rows[0][1])
    return found


def examine(
    run: RunFolder,
    path: Path,
    *,
    relations: Sequence[str] | None = None,
    limit: int | None = None,
    erase: str | None = None,
    out: Path | None = None,
    fill: Literal["zero", "unk"] = "zero",
    by: By = "attribution",
    **options: Any,
) -> dict[str, Any]:
    """What a run's answers lose when their neurons are suppressed and gain when they are amplified, and what a fact of
    another relation, drawn for each, loses beside it.

    Args:
        run: of a Transformer over text.
        path: the facts.
        relations: only these.
        limit: facts of a relation, at most.
        erase: a relation whose neurons are emptied afterwards.
        out: where a copy of the run with that edit goes.
        fill: what their columns then hold, zeros or the output row of the token of the unknown.
        by: what neurons are found by.
        options: of `KnowledgeNeurons`.

    Raises:
        TorchstoneError: bad facts, an unknown relation, a limit below 1, `out` or `fill` without `erase`, or `out` in
            use.
    """
    if limit is not None and limit < 1:
        raise TorchstoneError(f"interpret: limit is {limit}, it must be 1 or more")
    facts = read_facts(path)
    for name in [*(relations or ()), *([] if erase is None else [erase])]:
        if name not in facts:
            raise TorchstoneError(f"{path}: no relation {name!r}; relations: {', '.join(list(facts)[:10])}")
    if out is not None and erase is None:
        raise TorchstoneError("interpret: --out goes with --erase")
    if fill != "zero" and erase is None:
        raise TorchstoneError("interpret: --fill goes with --erase")
    if fill not in ("zero", "unk"):
        raise TorchstoneError(f"interpret: fill needs zero or unk, got {fill!r}")
    if out is not None and out.exists():
        raise TorchstoneError(f"{out}: exists already")
    wanted = dict.fromkeys([*(relations or facts), *([] if erase is None else [erase])])
    kept = {name: dict(list(facts[name].items())[:limit]) for name in wanted}
    model: Any = run.require().model()
    kn = KnowledgeNeurons(model, run.tokenizer(), **options)
    neurons = {name: kn.find_all(some, by) for name, some in kept.items()}

    def p(fact: Fact) -> float:
        return fmean(kn.probability(prompt, fact.answer) for prompt in fact.prompts)

    plain = {(name, fact): p(some[fact]) for name, some in kept.items() for fact in some}
    report: dict[str, Any] = {"relations": {}}
    for name, some in kept.items():
        rows: dict[str, dict[str, Any]] = {}
        elsewhere = [key for key in plain if key[0] != name]
        for fact, own in neurons[name].items():
            rows[fact] = {"answer": some[fact].answer, "probability": plain[name, fact], "neurons": _plain(own)}
            with kn.suppress(own):
                rows[fact]["suppressed"] = p(some[fact])
                if elsewhere:
                    at = int(Key(0).fold(name, fact).numpy().integers(len(elsewhere)))
                    relation, other = elsewhere[at]
                    rows[fact]["other"] = {
                        "relation": relation,
                        "fact": other,
                        "probability": plain[relation, other],
                        "suppressed": p(kept[relation][other]),
                    }
            with kn.amplify(own):
                rows[fact]["amplified"] = p(some[fact])
        report["relations"][name] = rows
    if erase is not None:
        report["erased"] = _erase(kn, kept, neurons[erase], erase, fill, plain, p)
        if out is not None:
            _copy(run, model, out)
            report["erased"]["run"] = str(out)
    return report


def _plain(neurons: Sequence[Neuron]) -> list[list[float]]:
    return [[each.layer, each.unit, each.score] for each in neurons]


def _erase(
    kn: KnowledgeNeurons, kept: Any, neurons: dict[str, list[Neuron]], name: str, fill: str, plain: Any, p: Any
) -> dict[str, Any]:
    """Empty the units of most facts of a relation, and say what it and others are answered then."""
    counts = Counter((each.layer, each.unit) for own in neurons.values() for each in own)
    units: list[Unit] = [unit for unit, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_ERASED]]
    if not units:
        raise TorchstoneError(f"interpret: relation {name!r} has no knowledge neurons to erase")
    kn.erase(units, fill)
    own = [(fact, p(kept[name][fact])) for fact in kept[name]]
    other = [((r, fact), p(some[fact])) for r, some in kept.items() if r != name for fact in some]
    found = {
        "relation": name,
        "neurons": [list(unit) for unit in units],
        "before": fmean(plain[name, fact] for fact, _ in own),
        "after": fmean(value for _, value in own),
    }
    if other:
        found |= {
            "others_before": fmean(plain[key] for key, _ in other),
            "others_after": fmean(value for _, value in other),
        }
    return found


def _copy(run: RunFolder, model: Any, out: Path) -> None:
    """A run like this one, with the model's weights as they are now."""
    made = out.with_name(f".{out.name}.making")
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(run.path, made, ignore=shutil.ignore_patterns("state", "ema.safetensors"))
    save_tensors(
        made / "model.safetensors", {parameter_name(name): value for name, value in model.state_dict().items()}
    )
    made.rename(out)


def text_of(report: dict[str, Any]) -> str:
    """The report in lines."""
    lines = [
        f"{'relation':20} {'facts':>5} {'neurons':>8} {'p':>7} {'suppressed':>11} {'amplified':>10} "
        f"{'another fact':>12} {'suppressed':>11}"
    ]
    for name, rows in report["relations"].items():
        each = list(rows.values())
        mean = {key: fmean(row[key] for row in each) for key in ("probability", "suppressed", "amplified")}
        count = fmean(len(row["neurons"]) for row in each)
        line = (
            f"{name:20} {len(each):5} {count:8.2f} {mean['probability']:7.4f} {mean['suppressed']:11.4f} "
            f"{mean['amplified']:10.4f}"
        )
        if beside := [row["other"] for row in each if "other" in row]:
            before, after = (fmean(other[key] for other in beside) for key in ("probability", "suppressed"))
            line += f" {before:12.4f} {after:11.4f}"
        lines.append(line)
    if erased := report.get("erased"):
        others = ""
        if "others_before" in erased:
            others = f"; other relations {erased['others_before']:.4f} -> {erased['others_after']:.4f}"
        lines.append(
            f"erased {len(erased['neurons'])} neurons of {erased['relation']}: p {erased['before']:.4f} -> "
            f"{erased['after']:.4f}{others}"
        )
    return "\n".join(lines)
