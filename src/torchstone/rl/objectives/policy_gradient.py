r"""Policy gradients from groups of answers: GRPO (Shao et al. 2024, arXiv 2402.03300), the reinforcement learning of
DeepSeek-R1 (DeepSeek-AI 2025, arXiv 2501.12948), and its relatives, which are options of one loss.

The policy writes `group` answers to each prompt, rules score them, and an answer's advantage A is how much better it is
than its group (`torchstone.rl.advantage`). For token t of answer i, with pi the policy in the distribution that tokens
are drawn from (temperature and truncation applied) and r the ratio of its probability to that when it wrote,

    L_it = -w_it min(r_it A_i, clip(r_it, 1 - low, 1 + high) A_i) + beta D_it
    D_it = q - log q - 1,  q = pi_ref(o_it) / pi(o_it)            (the k3 estimator of KL(pi || pi_ref))

    aggregate   token_mean: sum of L over all tokens / their number (DAPO, arXiv 2503.14476)
                sequence_mean: mean over an answer's tokens, then over answers (as published)
                constant: sum of L / (answers * max_new_tokens) (Dr. GRPO, arXiv 2503.20783)
    ratio       token: r_it; sequence: r_i = exp(mean over t of log r_it) for all tokens (GSPO, arXiv 2507.18071)
    correction  w = pi / pi_sampler at the time of writing, where the sampler's numbers are others: `truncate` at the
                cap, or `mask` tokens outside of [1 / cap, cap]; none is 1

DeepSeek-R1 prints r of an answer; the paper it refers to and all code take it of a token, which is the default here.
With one round each batch is used once, the ratio is 1 and L's gradient is that of -A log pi; what a log shows of the
loss then says nothing: look at the rewards. With n rounds a batch is divided into n parts, for a step each.

The loss is over what the policy wrote, the end token included, and never over prompts. Answers that no rule could score
are in no mean and no loss. Nothing is dropped in either pass. With ``beta: 0`` no reference is loaded. In a group whose
rewards are all the same D is left out too, unless `kl.flat_groups` asks for it.

Shapes: P prompts, R = P * group rows, T tokens of a row, N tokens that the policy wrote, D width.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.context import Aux
from torchstone.model.routed import routed_layers, routes_of
from torchstone.model.taps import Taps
from torchstone.objectives import Batch, Facts, Objective, ObjectiveSpec, Result, Term, tokens_of
from torchstone.objectives._frozen import WithReference, reference_of
from torchstone.rl.advantage import Advantage, advantages
from torchstone.rl.logprobs import log_probabilities
from torchstone.rl.reward import RewardSpec, Scorer
from torchstone.rl.rollout import PolicySampling, rollout
from torchstone.rl.routes import Replay
from torchstone.rl.trajectory import Trajectory, batch_of
from torchstone.spec import Part, Spec

__all__ = ["KLSpec", "PolicyGradient", "PolicyGradientSpec", "Written", "token_losses"]


_FAR = math.log(1.2)
"""Of a token's probability in training over that when it was drawn, or the reverse: beyond it the two are far apart."""


class KLSpec(Spec):
    """How much the policy is held near a reference."""

    beta: float = Field(0.0, ge=0, le=100)
    """Weight of the divergence; 0 loads no reference."""
    reference: str | None = Field(None, min_length=1)
    """Directory of the run that is the reference; without it that of `init_from`."""
    flat_groups: bool = False
    """Whether it also counts in groups whose rewards are all the same."""


class PolicyGradientSpec(ObjectiveSpec):
    """Make answers that score better than others to the same prompt likelier."""

    paper: ClassVar[str] = "Shao et al. 2024, arXiv 2402.03300; DeepSeek-AI 2025, arXiv 2501.12948"

    group: int = Field(8, ge=2, le=4096)
    """Answers to each prompt."""
    sampling: PolicySampling = PolicySampling()
    """How answers are written."""
    rewards: tuple[Part[RewardSpec], ...] = Field(min_length=1)
    """What answers are worth: the weighted sum of these; `pass@1` goes by the first."""
    advantage: Advantage = "group_std"
    """What an answer's reward is measured against: group_std, group_mean, leave_one_out, batch_std or none."""
    aggregate: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """What tokens' losses are divided by."""
    clip: tuple[Annotated[float, Field(gt=0, le=100)], Annotated[float, Field(gt=0, le=100)]] | None = (0.2, 0.2)
    """How far below and above 1 a ratio counts; 1 below and null clip none there."""
    ratio: Literal["token", "sequence"] = "token"
    """Whose ratio it is."""
    kl: KLSpec = KLSpec()
    """The reference."""
    rounds: int = Field(1, ge=1, le=1024)
    """Steps of the optimiser for each batch of answers, each on a part of its groups."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """What is done about log-probabilities of a sampler that are not the policy's own."""
    cap: float = Field(3.0, gt=1, le=1000)
    """Largest weight of that correction."""
    replay: Literal["none", "trainer", "rollout"] = "none"
    """Whose choices of experts the loss's forwards take: their own, those of the trained model when the answers were
    collected, or those made while they were written (Ma et al. 2025, arXiv 2510.11370)."""
    truncated: Literal["zero", "mask", "keep"] = "zero"
    """An answer without an end has the reward 0, counts as one that cannot be scored, or keeps what rules gave it."""

    def build(self, facts: Facts) -> Objective:
        run = self.kl.reference or facts.init_from
        reference = reference_of("policy_gradient", "reference", run, facts) if self.kl.beta else None
        return PolicyGradient(self, facts, reference, run or "")


@dataclass(frozen=True)
class Written:
    """The N tokens that a policy wrote, in order of rows.

    Attributes:
        row_N: row of each.
        length_R: how many each row has.
        logp_N: log-probability now, with a gradient.
        old_N, sampler_N: when it was written: by the trained model, and as the sampler gave it.
        advantage_R: of each row.
        reference_N: log-probability by the reference; None without one.
        held_R: rows in which the divergence counts.
    """

    row_N: torch.Tensor
    length_R: torch.Tensor
    logp_N: torch.Tensor
    old_N: torch.Tensor
    sampler_N: torch.Tensor
    advantage_R: torch.Tensor
    reference_N: torch.Tensor | None = None
    held_R: torch.Tensor | None = None


def token_losses(spec: PolicyGradientSpec, written: Written) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L of each token (N,), and for metrics by name a number of each token."""
    row_N, log_ratio_N = written.row_N, written.logp_N - written.old_N
    if spec.ratio == "sequence":
        sum_R = log_ratio_N.new_zeros(len(written.length_R)).index_add(0, row_N, log_ratio_N)
        log_ratio_N = (sum_R / written.length_R.clamp(min=1))[row_N]
    ratio_N, A_N = log_ratio_N.exp(), written.advantage_R[row_N]
    gain_N = ratio_N * A_N
    seen: dict[str, torch.Tensor] = {}
    if spec.clip is not None:
        low, high = 1 - spec.clip[0], 1 + spec.clip[1]
        gain_N = torch.minimum(gain_N, ratio_N.clamp(low, high) * A_N)
        seen["clip_low"] = (ratio_N < low) & (A_N < 0)
        seen["clip_high"] = (ratio_N > high) & (A_N > 0)
    gap_N = written.old_N - written.sampler_N
    weight_N = gap_N.exp()
    if spec.correction == "truncate":
        gain_N = gain_N * weight_N.clamp(max=spec.cap)
    elif spec.correction == "mask":
        gain_N = torch.where((weight_N <= spec.cap) & (weight_N >= 1 / spec.cap), gain_N * weight_N, 0.0)
    loss_N = -gain_N
    if written.reference_N is not None:
        away_N = written.reference_N - written.logp_N
        kl_N = torch.expm1(away_N) - away_N
        held_N = kl_N if written.held_R is None else torch.where(written.held_R[row_N], kl_N, 0.0)
        loss_N = loss_N + spec.kl.beta * held_N
        seen["kl"] = kl_N
    seen |= {"sampler_gap": gap_N.abs(), "sampler_kl": torch.expm1(gap_N) - gap_N, "sampler_far": gap_N.abs() > _FAR}
    return loss_N, {name: value.detach() for name, value in seen.items()}


def _lacks_routes(trajectory: Trajectory) -> bool:
    return trajectory.routes is None or bool((trajectory.routes < 0).all(-1).any())


class PolicyGradient(WithReference):
    """Batch: prompts as of data `prompts`; after `collect` ids, next, valid (R, T), the groups' rows side by side.

    Args:
        spec: the options.
        facts: tokenizer and rows of the prompts.
        reference: a causal language model, where the divergence has a weight.
        name: of the reference, for messages.
    """

    def __init__(
        self, spec: PolicyGradientSpec, facts: Facts, reference: nn.Module | None = None, name: str = "reference"
    ) -> None:
        super().__init__("policy_gradient", reference, name)
        self.spec, self.rounds = spec, spec.rounds
        self.tokenizer, self.rows = facts.tokenizer, facts.rows
        self.scorer = Scorer(spec.rewards)
        self.sampling = spec.sampling.sampling()
        self._said = False  # that routes are missing, once a training
        if self.rows is not None:
            self.scorer.check(self.rows)

    def check(self, model: nn.Module) -> None:
        for who, each in (("model", model), ("reference", self.reference)):
            alone = getattr(each, "decoder", None) is not None and getattr(each, "encoder", None) is None
            if each is not None and not alone:
                raise TorchstoneError(f"objective policy_gradient: needs a decoder alone; the {who} is none")
        if self.spec.replay != "none" and not routed_layers(model):
            raise TorchstoneError(
                "objective policy_gradient: replay is of routes, and no layer of the model has a router"
            )
        super().check(model)

    # -- answers

    def collect(self, model: nn.Module, batch: Batch, key: Key) -> Batch:
        replayed = self.spec.replay == "rollout"
        found = self._answers(model, batch, self.spec.group, key, replayed)
        if replayed and not self._said and any(_lacks_routes(each) for each in found):
            self._said = True
            print(
                "policy_gradient: answers lack routes, and such tokens go where the router sends them", file=sys.stderr
            )
        groups = [number // self.spec.group for number in range(len(found))]
        return self.batch(model, found, groups, batch["ids"].device)

    def _answers(self, model: nn.Module, batch: Batch, count: int, key: Key, routes: bool = False) -> list[Trajectory]:
        if self.tokenizer is None or self.rows is None:
            raise TorchstoneError("objective policy_gradient: needs prompts, as of data prompts")
        prompts = [ids[valid].tolist() for ids, valid in zip(batch["ids"], batch["valid"], strict=True)]
        examples = batch["example"].tolist()
        return rollout(
            model,
            self.tokenizer,
            prompts,
            examples,
            count,
            self.spec.sampling,
            key,
            self.scorer,
            self.rows,
            routes=routes,
        )

    def batch(
        self,
        model: nn.Module,
        trajectories: Sequence[Trajectory],
        groups: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> Batch:
        """Rows to train on: what was written, with rewards, advantages and what other models think of it."""
        rewards = [self._reward(each) for each in trajectories]
        advantage_R, spread_R = advantages(rewards, groups, self.spec.advantage)
        names, dtype = self.scorer.names, torch.get_default_dtype()
        parts = [[each.rewards.get(name) for name in names] for each in trajectories]
        batch = batch_of(trajectories, self.tokenizer.pad) | {
            "reward": torch.tensor([reward or 0.0 for reward in rewards], dtype=dtype),
            "scored": torch.tensor([reward is not None for reward in rewards]),
            "advantage": torch.from_numpy(advantage_R).to(dtype),
            "spread": torch.from_numpy(spread_R).to(dtype),
            "parts": torch.tensor([[part or 0.0 for part in each] for each in parts], dtype=dtype),
            "known": torch.tensor([[part is not None for part in each] for each in parts]),
        }
        if self.spec.replay != "rollout":
            batch.pop("routes", None)
        batch["next"] = torch.where(batch["scored"][:, None], batch["next"], -100)
        batch = {name: value.to(device) for name, value in batch.items()}
        with torch.no_grad():
            if self.spec.replay == "trainer":
                batch["routes"] = self._routes(model, batch)
            if self.spec.rounds > 1:
                batch["old"] = self._log_probabilities(model, batch)
            if self.reference is not None:
                plain = {name: value for name, value in batch.items() if name != "routes"}
                batch["reference"] = self._log_probabilities(self.reference, plain)
        return batch

    def _reward(self, trajectory: Trajectory) -> float | None:
        if not trajectory.truncated or self.spec.truncated == "keep":
            return trajectory.reward
        return 0.0 if self.spec.truncated == "zero" else None

    def agree(self, batches: list[Batch], total: Callable[[torch.Tensor], torch.Tensor]) -> list[Batch]:
        if self.spec.advantage != "batch_std":
            return batches
        wide = torch.float32 if batches[0]["reward"].device.type == "mps" else torch.float64
        reward_R = torch.cat([batch["reward"][batch["scored"]] for batch in batches]).to(wide)
        count, mass = total(torch.stack([torch.ones_like(reward_R).sum(), reward_R.sum()]))
        variance = total((reward_R - mass / count.clamp(min=1)).square().sum()) / count.clamp(min=1)
        std = torch.where(variance > 0, variance.sqrt(), 1.0)
        return [{**batch, "advantage": (batch["advantage"] / std).to(batch["advantage"].dtype)} for batch in batches]

    # -- the loss

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        tokens = batch["valid"].sum() if "valid" in batch else torch.tensor(batch["ids"].numel())
        if "next" not in batch:  # prompts that are to be answered for measuring
            return {"rows": torch.tensor(len(batch["ids"])), "tokens": tokens}
        targets_RT = batch["next"] >= 0
        return {"targets": targets_RT.sum(), "rows": targets_RT.any(1).sum(), "tokens": tokens}

    def forward(self, model: nn.Module, batch: Batch, key: Key | None) -> Result:
        where_RT = batch["next"] >= 0
        replay = Replay(model, batch["routes"], batch["valid"]) if "routes" in batch else None
        out, logp_N, entropy_N = self._pass(model, batch, where_RT, replay)

        def given(name: str, otherwise: torch.Tensor | None = None) -> Any:
            return batch[name][where_RT].to(logp_N.dtype) if name in batch else otherwise

        row_N, length_R = where_RT.nonzero()[:, 0], where_RT.sum(1)
        advantage_R = batch["advantage"].to(logp_N.dtype)
        held_R = (batch["spread"] > 0) | (advantage_R != 0) | self.spec.kl.flat_groups
        written = Written(
            row_N, length_R, logp_N, given("old", logp_N.detach()), given("sampler"), advantage_R,
            given("reference"), held_R,
        )  # fmt: skip
        loss_N, seen = token_losses(self.spec, written)
        if self.spec.aggregate == "token_mean":
            term = Term(loss_N.sum(), "targets")
        elif self.spec.aggregate == "sequence_mean":
            term = Term((loss_N / length_R[row_N]).sum(), "rows")
        else:
            term = Term(loss_N.sum(), "rows", 1 / self.spec.sampling.max_new_tokens)
        result = Result.of({"loss": term}, out.aux)
        tokens = where_RT.sum()
        seen["entropy"] = entropy_N
        metrics = {name: (value.sum(), tokens) for name, value in seen.items()}
        flat_R = (batch["spread"] == 0) & batch["scored"]
        metrics |= self._scores(batch) | {
            "reward_std": (batch["spread"].sum(), torch.ones_like(batch["length"]).sum()),
            "flat_groups": (flat_R.sum(), batch["scored"].sum()),
        }
        if replay is not None:
            metrics |= replay.metrics()
        elif self.spec.replay != "none":
            metrics["routes_missing"] = batch["valid"].sum(), batch["valid"].sum()
        return Result(result.terms, {**result.metrics, **metrics})

    def evaluate(self, model: nn.Module, batch: Batch, predict: bool = False) -> Result:
        """One answer to each prompt; the loss is its reward, with a minus."""
        found = self._answers(model, batch, 1, Key(0).fold("evaluate"))
        rows = self.batch(model, found, range(len(found)), batch["ids"].device)
        scores = self._scores(rows)
        solved_R = (rows["parts"][:, 0] >= 1) & rows["known"][:, 0]
        scores["pass@1"] = solved_R.sum(), rows["known"][:, 0].sum()
        return Result({"loss": Term(-rows["reward"].sum(), "rows")}, scores=scores)

    def _scores(self, batch: Batch) -> Aux:
        """Means over answers; of rewards, over those that have one."""
        answers = torch.ones_like(batch["length"]).sum()
        found = {
            "reward": (batch["reward"].sum(), batch["scored"].sum()),
            "length": (batch["length"].sum(), answers),
            "truncated": (batch["truncated"].sum(), answers),
            "unscored": ((~batch["scored"]).sum(), answers),
        }
        parts = zip(self.scorer.names, batch["parts"].T, batch["known"].T, strict=True)
        return found | {f"reward_{name}": (part.sum(), known.sum()) for name, part, known in parts}

    def _pass(
        self, model: Any, batch: Batch, where_RT: torch.Tensor, replay: Replay | None = None
    ) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """What the model gives, and of the tokens that the policy wrote log-probabilities and entropies."""
        taps = {} if replay is None else {"taps": replay.taps}
        out = model(tokens_of(batch), outputs="none", **taps)  # without a key: nothing is dropped
        product = model.vocabulary_head().product(out.hidden[where_RT], model.embedding.table())
        return out, *log_probabilities(product, batch["next"][where_RT], self.sampling)

    def _log_probabilities(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """(R, T), zero where the policy wrote nothing."""
        where_RT = batch["next"] >= 0
        replay = Replay(model, batch["routes"], batch["valid"]) if "routes" in batch else None
        logp_N = self._pass(model, batch, where_RT, replay)[1]
        return torch.zeros_like(where_RT, dtype=logp_N.dtype).masked_scatter(where_RT, logp_N)

    @staticmethod
    def _routes(model: nn.Module, batch: Batch) -> torch.Tensor:
        """Choices of the trained model itself, (R, T, L, K), -1 for padding."""
        taps = Taps(record=["decoder.layers.*.router.experts"])
        model(tokens_of(batch), outputs="none", taps=taps)
        return torch.where(batch["valid"][..., None, None], routes_of(model, taps.seen), -1).to(torch.int16)
