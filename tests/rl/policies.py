"""Small policies and tasks for tests of reinforcement learning."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import tiny
from torchstone.model.head import Product
from torchstone.model.tokens import Tokens
from torchstone.model.transformer import Output
from torchstone.objectives import Facts
from torchstone.recipe import load_recipe
from torchstone.rl.objectives.policy_gradient import PolicyGradient, PolicyGradientSpec
from torchstone.rl.trajectory import Trajectory
from torchstone.spec import validate
from torchstone.train.run import build_model

END, LONGEST = 0, 3


class Letters:
    """A tokenizer whose token n is the n-th letter; 0 ends a text."""

    separator, pad = END, 1

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(96 + token) for token in ids)


class Table(nn.Module):
    """A policy over three tokens that knows what it wrote: logits by the last two tokens and the place. A prompt is one
    token, 0."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight_VD = nn.Parameter(torch.randn(3, 27, generator=generator))
        self.decoder, self.encoder, self.embedding = self, None, self

    def vocabulary_head(self) -> Table:
        return self

    def table(self) -> None:
        return None

    def product(self, h: torch.Tensor, table: None) -> Product:
        return Product(h, self.weight_VD)

    def forward(self, tokens: Tokens, outputs: str = "none") -> Output:
        assert tokens.ids is not None
        ids_BT = tokens.ids.clamp(max=2)
        before_BT = torch.cat([torch.zeros_like(ids_BT[:, :1]), ids_BT[:, :-1]], 1)
        place_T = torch.arange(ids_BT.shape[1]).clamp(max=2)
        which_BT = 9 * place_T + 3 * before_BT + ids_BT
        return Output(torch.nn.functional.one_hot(which_BT, 27).to(self.weight_VD.dtype))


def answers() -> list[tuple[int, ...]]:
    """Everything that can be written in three tokens."""
    found = [o for n in range(1, LONGEST + 1) for o in itertools.product(range(3), repeat=n)]
    return [o for o in found if END not in o[:-1] and (o[-1] == END or len(o) == LONGEST)]


def log_probability(model: nn.Module, answer: Sequence[int]) -> torch.Tensor:
    """Of each token of an answer to the prompt (0,), from all logits."""
    ids = torch.tensor([[0, *answer[:-1]]])
    logits = nn.functional.linear(model(Tokens.of(ids)).hidden[0], model.weight_VD)  # type: ignore[arg-type]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def written(model: nn.Module, answer: Sequence[int], reward: float | None, example: int = 0) -> Trajectory:
    logp = tuple(log_probability(model, answer).tolist())
    return Trajectory((0,), tuple(answer), logp, "eos", example, "", 0, {"exact": reward}, reward)


def objective(**fields: Any) -> PolicyGradient:
    fields = {"rewards": [{"kind": "exact"}], "sampling": {"max_new_tokens": LONGEST}, **fields}
    spec = validate(PolicyGradientSpec, fields)
    return PolicyGradient(spec, Facts(3, tokenizer=Letters(), rows={n: {"answer": ""} for n in range(100)}))


def transformer(seed: int = 0, **fields: Any) -> nn.Module:
    """A model whose scores differ, of 30 tokens."""
    body = {**tiny.MODEL, "vocabulary": 30, "residual": {"std": 0.3}, **fields}
    return build_model(load_recipe({"model": body}).model, seed)
