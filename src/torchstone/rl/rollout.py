"""Rollout: several answers of a policy to each prompt, scored.

The noise of an answer is a function of the key, of the prompt's number and of which of its answers it is, so that an
answer does not depend on what else is in its batch. Equal prompts are read once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field
from torch import nn

from torchstone.generate.engine import Engine
from torchstone.generate.noise.seeded import SeededNoise
from torchstone.generate.sampling import Sampling
from torchstone.keys import Key
from torchstone.rl.reward import Scorer
from torchstone.rl.trajectory import Trajectory
from torchstone.spec import Spec

__all__ = ["PolicySampling", "rollout"]


class PolicySampling(Spec):
    """From which part of its distribution a policy writes, and how much."""

    temperature: float = Field(1.0, gt=0, le=100)
    """Scores are divided by it, when tokens are drawn and when they are trained on."""
    top_k: int | None = Field(None, ge=1)
    """Draw among the k best tokens."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Draw among the fewest best tokens that hold this probability."""
    max_new_tokens: int = Field(128, ge=1)
    """Tokens of an answer, at most."""

    def sampling(self) -> Sampling:
        """As the engine takes it, with log-probabilities recorded."""
        return Sampling(**self.dump(), logprobs=0)


def rollout(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    examples: Sequence[int],
    count: int,
    sampling: PolicySampling,
    key: Key,
    scorer: Scorer,
    rows: Mapping[int, Mapping[str, Any]],
    end: int | None = None,
    routes: bool = False,
) -> list[Trajectory]:
    """`count` answers to each prompt, side by side.

    Args:
        model: the policy.
        tokenizer: turns ids into text; its separator ends an answer, unless `end` is given.
        prompts: ids.
        examples: numbers of the prompts.
        count: answers to each.
        sampling: how.
        key: of the noise.
        scorer: what answers are worth.
        rows: fields of the prompts, by their numbers.
        end: id of the end token.
        routes: whether to keep which experts tokens were sent to.

    Raises:
        TorchstoneError: a prompt is too long for the model, or a reward is no number.
    """
    end = tokenizer.separator if end is None else end
    engine = Engine(model, compile="off", eos=end)
    seen: Counter[int] = Counter()
    names = []
    for example in examples:  # a prompt that stands twice in a batch gets answers of its own each time
        names += [f"{example}.{seen[example] * count + member}" for member in range(count)]
        seen[example] += 1
    texts = [tokenizer.decode(ids) for ids in prompts]
    done = engine.generate(
        [ids for ids in prompts for _ in range(count)],
        sampling.sampling(),
        requests=names,
        noise=SeededNoise(key.value),
        routes=routes,
    )
    answers = [tokenizer.decode(each.ids[:-1] if each.finish == "eos" else each.ids) for each in done]
    whose = [example for example in examples for _ in range(count)]
    scores = scorer.score_all(answers, [rows[example] for example in whose], whose)
    found = []
    for number, (name, each, text, rewards) in enumerate(zip(names, done, answers, scores, strict=True)):
        assert each.adjusted_logprobs is not None
        found.append(
            Trajectory(
                tuple(each.prompt_ids),
                tuple(each.ids),
                tuple(each.adjusted_logprobs),
                each.finish,
                whose[number],
                name,
                key.value,
                rewards,
                scorer.total(rewards),
                texts[number // count],
                text,
                each.routes,
            )
        )
    return found
