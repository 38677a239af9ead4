"""What can be done with a policy and with a file of its answers: sample and score, train on one batch of them again
without a step, and keep the good ones as text to tune on."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from torchstone.errors import TorchstoneError
from torchstone.files import full_disk
from torchstone.keys import Key
from torchstone.objectives import Facts
from torchstone.recipe import parse_yaml
from torchstone.rl.data.prompts import prompts_of
from torchstone.rl.objectives.policy_gradient import PolicyGradient, PolicyGradientSpec
from torchstone.rl.reward import RewardSpec, Scorer
from torchstone.rl.rollout import PolicySampling, rollout
from torchstone.rl.trajectory import Trajectory, dump, read
from torchstone.spec import Part, Spec, validate
from torchstone.train.environment import choose_device
from torchstone.train.run import RunFolder

__all__ = ["filter_dump", "replay", "sample"]


class _Rewards(Spec):
    rewards: tuple[Part[RewardSpec], ...]


def _writable(out: Path, read: Path) -> None:
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise TorchstoneError(f"{out}: cannot be written; a file in a folder that exists is needed")
    if out.resolve() == read.resolve():
        raise TorchstoneError(f"{out}: is the file that is read; another one is needed to write to")


def sample(
    run: RunFolder,
    prompts: Path,
    out: Path,
    *,
    count: int = 8,
    rewards: Sequence[str] = (),
    field: str | None = None,
    template: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch: int = 32,
    device: str = "cpu",
    **sampling: Any,
) -> dict[str, Any]:
    """Answer prompts several times, score the answers and write them down.

    Args:
        run: whose policy answers.
        prompts: JSON lines.
        out: file of trajectories.
        count: answers to each prompt.
        rewards: rules, as ``math_answer`` or ``{kind: exact, pattern: "=(.*)"}``; none takes those that the run was
            trained with.
        field, template: where the prompt stands, and the text around it; as the run's own data have them if not given.
        limit: prompts, at most.
        seed: of the noise.
        batch: prompts at once.
        device: where the model runs.
        sampling: fields of `PolicySampling`; those not given are the run's, if it was trained by policy gradients.

    Raises:
        TorchstoneError: nothing to score with, no prompts, bad input, a file that cannot be written.
    """
    _writable(out, prompts)
    run.require()
    if count < 1 or batch < 1 or (limit is not None and limit < 1):
        raise TorchstoneError(f"rl sample: n, batch and limit are 1 or more, not {count}, {batch}, {limit}")
    own, data = run.recipe.objective, run.recipe.data
    trained = own if isinstance(own, PolicyGradientSpec) else None
    if rewards:
        rules: Any = validate(_Rewards, {"rewards": [parse_yaml(text, "reward") for text in rewards]}).rewards
    elif trained is not None:
        rules = trained.rewards
    else:
        raise TorchstoneError("rl sample: needs a reward; this run was trained with none")
    how = trained.sampling if trained is not None else PolicySampling()
    how = validate(PolicySampling, {**how.dump(), **{name: v for name, v in sampling.items() if v is not None}})
    same = data.kind == "prompts"
    field = field or (data.prompt if same else "prompt")  # type: ignore[attr-defined]
    template = template if template is not None or not same else data.template  # type: ignore[attr-defined]
    rows, texts = prompts_of(str(prompts), field, template)
    if not rows:
        raise TorchstoneError(f"{prompts}: holds no prompt")
    rows, texts = rows[:limit], texts[:limit]
    scorer, numbered = Scorer(rules), dict(enumerate(rows))
    scorer.check(numbered)
    tokenizer, model = run.tokenizer(), run.model(device=choose_device(device)).eval()
    ids = [[*tokenizer.front, *some] for some in tokenizer.encode_batch(texts)]
    found: list[Trajectory] = []
    for first in range(0, len(ids), batch):
        some = range(first, min(first + batch, len(ids)))
        found += rollout(
            model, tokenizer, [ids[n] for n in some], some, count, how, Key(seed).fold("rl sample"), scorer, numbered,
            routes=trained is not None and trained.replay == "rollout",
        )  # fmt: skip
    dump(out, found, how.dump())
    return _summary(found, count, scorer)


def _summary(found: Sequence[Trajectory], count: int, scorer: Scorer) -> dict[str, Any]:
    """Means over answers; of the prompts that the first rule is for the share with a full reward among their answers,
    and of those whose most frequent answer has it, the earlier one of two that are as frequent (consensus, where that
    rule finds an answer)."""

    def mean(values: Sequence[float | bool]) -> float | None:
        return sum(values) / len(values) if values else None

    main = scorer.names[0]
    first, _ = scorer.rules[main]
    right: list[bool] = []
    full: dict[int, bool] = {}
    votes: dict[int, list[tuple[Hashable, bool]]] = {}
    for each in found:
        if main not in each.rewards:
            continue
        right.append((each.rewards[main] or 0.0) >= 1)
        full[each.example] = full.get(each.example, False) or right[-1]
        if (answer := first.answer_of(each.text)) is not None:
            votes.setdefault(each.example, []).append((answer, right[-1]))
    rewards = {name: mean([v for each in found if (v := each.rewards.get(name)) is not None]) for name in scorer.names}
    return {
        "prompts": len({each.example for each in found}),
        "answers": len(found),
        "rewards": rewards,
        "reward": mean([each.reward for each in found if each.reward is not None]),
        "pass@1": mean(right),
        f"pass@{count}": mean(list(full.values())),
        f"cons@{count}": sum(Counter(some).most_common(1)[0][0][1] for some in votes.values()) / len(full)
        if votes
        else None,
        "length": mean([len(each.ids) for each in found]),
        "truncated": mean([each.truncated for each in found]),
    }


def replay(file: Path, run: RunFolder, *, device: str = "cpu") -> dict[str, Any]:
    """The loss of dumped answers, as the run's model and objective (or the plain one) have it, without a step.

    Raises:
        TorchstoneError: the file is none of trajectories, or was altered; holds tokens that the model has not; answers
            of one prompt alone.
    """
    run.require()
    found, settings = read(file)
    own = run.recipe.objective
    body = own.dump() if isinstance(own, PolicyGradientSpec) else {"rewards": [{"kind": "exact"}]}
    # the rewards are those of the file, whatever would be given today
    spec: Any = validate(PolicyGradientSpec, {**body, "sampling": settings, "kl": {}, "rounds": 1})
    where = choose_device(device)
    objective: Any = PolicyGradient(spec, Facts(tokenizer=run.tokenizer())).to(where)
    objective.scorer = Scorer([])
    model: Any = run.model(device=where).eval()
    objective.check(model)
    known = model.spec.vocabulary
    if (
        strange := next((t for each in found for t in (*each.prompt, *each.ids) if not 0 <= t < known), None)
    ) is not None:
        raise TorchstoneError(f"{file}: holds the token {strange}, and the model has {known:,}")
    plain = [replace(each, rewards={}) for each in found]
    batch = objective.batch(model, plain, [each.example for each in found], where)
    (batch,) = objective.agree([batch], lambda x: x)
    counts = objective.counts(batch)
    with torch.no_grad():
        result = objective(model, batch, None)
    term = result.terms["loss"]
    row = {name: (total / count.clamp(min=1)).item() for name, (total, count) in result.metrics.items()}
    loss = (term.weight * term.total / counts[term.over].clamp(min=1)).item()
    return {"answers": len(found), "tokens": int(counts["targets"]), "loss": loss, **row}


def filter_dump(
    file: Path, out: Path, *, at_least: float = 1.0, per_prompt: int | None = None, drop: str | None = None
) -> dict[str, int]:
    """Write prompts and answers that score well enough as rows of data `responses`: rejection sampling.

    Args:
        file: of trajectories.
        out: JSON lines with ``prompt`` and ``response``.
        at_least: the least weighted reward that is kept.
        per_prompt: different answers of a prompt that are kept, at most; the first.
        drop: regular expression of what no answer that is kept may hold: paragraphs too long, code.

    Raises:
        TorchstoneError: the file is none of trajectories; `drop` is no regular expression; nothing is left.
    """
    _writable(out, file)
    if per_prompt is not None and per_prompt < 1:
        raise TorchstoneError(f"rl filter: per_prompt is 1 or more, not {per_prompt}")
    try:
        unwanted = None if drop is None else re.compile(drop, re.DOTALL)
    except re.error as error:
        raise TorchstoneError(f"rl filter: drop is no regular expression: {error}") from None
    found, _ = read(file)
    kept: dict[int, dict[str, str]] = {}
    good = [each for each in found if each.reward is not None and each.reward >= at_least and not each.truncated]
    if unwanted is not None:
        good = [each for each in good if not unwanted.search(each.text)]
    for each in good:
        mine = kept.setdefault(each.example, {})
        if per_prompt is None or len(mine) < per_prompt:
            mine.setdefault(each.text, each.prompt_text)
    rows = [{"prompt": prompt, "response": text} for mine in kept.values() for text, prompt in mine.items()]
    if not rows:
        raise TorchstoneError(f"{file}: none of {len(found):,} answers is kept; {at_least:g} or more is needed")
    with full_disk(out), open(out, "w", encoding="utf-8") as target:
        target.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return {"answers": len(found), "good": len(good), "kept": len(rows), "prompts": len(kept)}
