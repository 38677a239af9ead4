"""A preference that is known because it was planted: what direct preference optimisation learns of it."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from torchstone.data.preferences import Pair, Pairs, PreferencesDataSpec, PreparedPreferences
from torchstone.keys import Key
from torchstone.papers._claim import Claim, Effect, Measured, Number, Scale, one_thread
from torchstone.train import RunFolder, train

__all__ = ["PLANTED_PREFERENCE"]

_LETTERS, _PROMPT, _RESPONSE, _BLOCK = "abcdefgh", 3, 6, 12
_TUNING = 100_000
"""Distance of the seed that learning rates are chosen on."""


class ShuffledSpec(PreferencesDataSpec):
    """Preferences of which a coin decides for train: the claim's sabotage arm. Valid and test stay true."""

    kind: ClassVar[str] = "preferences_shuffled"
    offered: ClassVar[bool] = False

    def prepare(self, progress: Callable[[str], None] | None = None) -> PreparedPreferences:
        prepared = super().prepare(progress)
        heads = Key(0).fold("shuffled", prepared.hash).numpy().random(len(prepared.train)) < 0.5
        pairs = [
            Pair(pair.prompt, pair.rejected, pair.chosen) if head else pair
            for head, pair in zip(heads, prepared.train.pairs, strict=True)
        ]
        return replace(prepared, train=Pairs(pairs, self.block, prepared.tokenizer))


@dataclass(frozen=True)
class _Size:
    """What a scale spends: steps of the causal language model, of the preferences, and grids of learning rates."""

    first_steps: int
    steps: int
    batch: int
    pairs: int
    seeds: int
    control_seeds: int
    first_grid: tuple[float, ...]
    grid: tuple[float, ...]


_SIZES = {
    "quick": _Size(100, 100, 16, 2_000, 1, 1, (3e-3,), (1e-3,)),
    "evidence": _Size(300, 400, 32, 8_000, 5, 3, (1e-3, 3e-3, 1e-2), (1e-4, 3e-4, 1e-3)),
}


def _letters(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(_LETTERS, k=count))


def _prompt(rng: random.Random) -> str:
    return _letters(rng, _PROMPT) + rng.choice("+-")


def _response(rng: random.Random, prompt: str) -> str:
    """Letters that know nothing of the prompt, and a mark that does: so the first model learns to look at its sign."""
    return _letters(rng, _RESPONSE) + ("!" if prompt.endswith("+") else "?")


def _liked(prompt: str, response: str) -> int:
    """The rule: a prompt that ends in plus wants letters of the alphabet's first half, one that ends in minus the
    others."""
    first = sum(letter in _LETTERS[: len(_LETTERS) // 2] for letter in response)
    return first if prompt.endswith("+") else _RESPONSE - first


def _write(folder: Path, size: _Size, seed: int) -> None:
    """Texts of prompts and responses, and pairs of such responses: the one that the rule likes better is chosen."""
    rng = random.Random(seed)
    prompts = [_prompt(rng) for _ in range(size.pairs)]
    texts = "".join(json.dumps({"text": prompt + _response(rng, prompt)}) + "\n" for prompt in prompts)
    (folder / "texts.jsonl").write_text(texts)
    rows: list[str] = []
    while len(rows) < size.pairs:
        prompt = _prompt(rng)
        one, other = _response(rng, prompt), _response(rng, prompt)
        if _liked(prompt, one) != _liked(prompt, other):
            chosen, rejected = (one, other) if _liked(prompt, one) > _liked(prompt, other) else (other, one)
            rows.append(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    (folder / "pairs.jsonl").write_text("".join(rows))


def _first(folder: Path, size: _Size, seed: int, lr: float) -> RunFolder:
    """A causal language model of the texts: the reference."""
    recipe = {
        "model": {"width": 64, "depth": 2, "attention": {"heads": 4}, "context": 64},
        "data": {
            "corpus": {"kind": "jsonl", "path": str(folder / "texts.jsonl")},
            "tokenizer": "bytes",
            "block": 64,
            "cache": str(folder / "cache"),
        },
        "optimizer": {"lr": lr},
        "schedule": {"kind": "cosine", "warmup": 20},
        **one_thread(size.first_steps, 16, blocks=64),
    }
    recipe["trainer"] |= {"seed": seed, "device": "cpu"}
    return train(recipe, out=folder / f"first-{lr}", quiet=True)


def _preferred(folder: Path, size: _Size, seed: int, lr: float, kind: str, reference: RunFolder) -> RunFolder:
    recipe = {
        "init_from": str(reference.path),
        "data": {"kind": kind, "path": str(folder / "pairs.jsonl"), "block": _BLOCK, "cache": str(folder / "cache")},
        "objective": {"kind": "dpo"},
        "optimizer": {"lr": lr, "weight_decay": 0.0},
        "schedule": {"kind": "cosine", "warmup": 20},
        **one_thread(size.steps, size.batch, blocks=400),
    }
    recipe["trainer"] |= {"seed": seed, "device": "cpu"}
    return train(recipe, out=folder / f"{kind}-{lr}", quiet=True)


def _last(run: RunFolder, name: str) -> float:
    return float([row[name] for row in run.metrics() if name in row][-1])


@torch.no_grad()
def _divergence(policy: RunFolder, reference: RunFolder, seed: int, count: int = 512) -> float:
    """KL of the policy's responses from the reference's, nats a response: prompts of the task, responses by the policy
    of as many tokens as those of the pairs at most, the divergence of each next token added up."""
    rng, generator = random.Random(seed), Key(seed).fold("divergence").generator()
    tokenizer, models = policy.tokenizer(), [run.model() for run in (policy, reference)]
    prompts = [_prompt(rng) for _ in range(count)]
    ids_BT = torch.tensor([[tokenizer.separator, *tokenizer.encode(prompt)] for prompt in prompts])
    going_B, total = torch.ones(count, dtype=torch.bool), 0.0
    for _ in range(_RESPONSE + 2):
        logp_BV, theirs_BV = (model(ids_BT, outputs="last").logits[:, -1].log_softmax(-1) for model in models)
        total += float(((logp_BV.exp() * (logp_BV - theirs_BV)).sum(-1) * going_B).sum())
        drawn_B1 = torch.multinomial(logp_BV.exp(), 1, generator=generator)
        going_B &= drawn_B1[:, 0] != tokenizer.separator
        ids_BT = torch.cat([ids_BT, drawn_B1], 1)
    return total / count


_ARMS = {"policy": "preferences", "shuffled": "preferences_shuffled"}


def _tuned(size: _Size, seed: int) -> tuple[float, dict[str, float]]:
    """The learning rate of the reference by its validation loss, and of each arm by its accuracy on valid."""
    if len(size.grid) == 1:
        return size.first_grid[0], dict.fromkeys(_ARMS, size.grid[0])
    with tempfile.TemporaryDirectory(prefix="torchstone-dpo-") as name:
        folder = Path(name)
        _write(folder, size, seed)
        firsts = {lr: _first(folder, size, seed, lr) for lr in size.first_grid}
        first = min(firsts, key=lambda lr: _last(firsts[lr], "valid_loss"))
        return first, {
            arm: max(
                size.grid,
                key=lambda lr, kind=kind: _last(  # type: ignore[misc]
                    _preferred(folder, size, seed, lr, kind, firsts[first]), "valid_accuracy"
                ),
            )
            for arm, kind in _ARMS.items()
        }


def _planted(scale: Scale, first: int) -> Measured:
    size = _SIZES[scale]
    first_lr, rates = _tuned(size, first + _TUNING)
    values: dict[str, dict[int, float]] = {}
    for seed in range(first, first + size.seeds):
        with tempfile.TemporaryDirectory(prefix="torchstone-dpo-") as name:
            folder = Path(name)
            _write(folder, size, seed)
            reference = _first(folder, size, seed, first_lr)
            for arm, kind in _ARMS.items():
                if arm == "shuffled" and seed >= first + size.control_seeds:
                    continue
                run = _preferred(folder, size, seed, rates[arm], kind, reference)
                values.setdefault(arm, {})[seed] = _last(run, "test_accuracy")
                values.setdefault(f"{arm}, KL in nats a response", {})[seed] = _divergence(run, reference, seed)
                values.setdefault("reference", {})[seed] = _last(run, "test_reference_accuracy")
            values.setdefault("one half", {})[seed] = 0.5

    def mean(arm: str) -> float:
        return sum(values[arm].values()) / len(values[arm])

    return Measured(
        {
            "accuracy of the reference's own log-probabilities, from one half": abs(mean("reference") - 0.5),
            "accuracy after shuffled labels, from one half": abs(mean("shuffled") - 0.5),
            "KL of the policy from the reference, nats a response": mean("policy, KL in nats a response"),
            "learning rate of the reference": first_lr,
            **{f"learning rate of {arm}": lr for arm, lr in rates.items()},
        },
        values,
    )


_planted.builds = (  # type: ignore[attr-defined]
    "torchstone.objectives.dpo",
    "torchstone.data.preferences",
)

PLANTED_PREFERENCE = Claim(
    id="planted-preference",
    kind="behaviour",
    text="A byte model of two layers learns responses whose letters know nothing of their prompts, then 8,000 pairs of"
    " such responses of which one was chosen by a rule: after a plus the one with more letters of the alphabet's "
    "first half, after a minus the other (400 steps, each stage at the best of three learning rates). By its "
    "implicit reward it prefers the right one of at least 9 in 10 held-out pairs, where the reference's own log-"
    "probabilities are within 0.05 of one half and labels drawn by chance leave it within 0.1. The KL from the "
    "reference is measured beside it and no part of the claim.",
    figure="one epoch of DPO at a learning rate of 5e-6 after supervised fine-tuning",
    gates=(
        Effect(
            "accuracy of the implicit reward above 0.9",
            "policy",
            "one half",
            margin=0.4,  # 0.9 of held-out pairs, from chance
            null="reference",
            sabotage="shuffled",
            lower_is_better=False,
        ),
        Number("accuracy of the reference's own log-probabilities, from one half", high=0.05),
        Number("accuracy after shuffled labels, from one half", high=0.1),
    ),
    run=_planted,
)
