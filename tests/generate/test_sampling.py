"""Score functions equal transformers' processors; the choice is an exact sample that depends on nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from torchstone.errors import TorchstoneError
from torchstone.generate import History, Sampling, SeededNoise
from torchstone.generate.sampling import min_p, repetition_penalty, temperature, top_k, top_p
from torchstone.spec import validate

transformers = pytest.importorskip("transformers")


def logits(rows: int = 5, vocabulary: int = 37, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def history(rows: int, step: int = 0, seen: torch.Tensor | None = None) -> History:
    return History(list(range(rows)), step, [[] for _ in range(rows)], seen)


@pytest.mark.parametrize("value", [0.3, 1.0, 1.7])
def test_temperature_equals_transformers(value: float) -> None:
    assert torch.equal(temperature(logits(), value), transformers.TemperatureLogitsWarper(value)(None, logits()))


@pytest.mark.parametrize("k", [1, 4, 37, 1000])
def test_top_k_equals_transformers(k: int) -> None:
    assert torch.equal(top_k(logits(), k), transformers.TopKLogitsWarper(k)(None, logits()))


def test_top_k_keeps_ties_as_transformers_does() -> None:
    tied = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    assert torch.equal(top_k(tied, 2), transformers.TopKLogitsWarper(2)(None, tied))


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_equals_transformers(p: float) -> None:
    assert torch.equal(top_p(logits(), p), transformers.TopPLogitsWarper(p)(None, logits()))


def test_top_p_of_one_keeps_everything() -> None:
    assert torch.equal(top_p(logits(), 1.0), logits())


@pytest.mark.parametrize("p", [0.0, 0.01, 0.3, 1.0])
def test_min_p_equals_transformers(p: float) -> None:
    assert torch.equal(min_p(logits(), p), transformers.MinPLogitsWarper(p)(None, logits()))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    ids = torch.randint(37, (5, 9), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(5, 37, dtype=torch.bool).scatter(1, ids, True)
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits())
    assert torch.equal(repetition_penalty(logits(), seen, penalty), theirs)


def test_all_together_equal_transformers_in_its_order() -> None:
    ids = torch.randint(37, (5, 9), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(5, 37, dtype=torch.bool).scatter(1, ids, True)
    theirs = transformers.LogitsProcessorList(
        [
            transformers.RepetitionPenaltyLogitsProcessor(1.3),
            transformers.TemperatureLogitsWarper(0.7),
            transformers.TopKLogitsWarper(20),
            transformers.TopPLogitsWarper(0.9),
            transformers.MinPLogitsWarper(0.02),
        ]
    )(ids, logits())
    ours = Sampling(temperature=0.7, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.3)
    assert torch.equal(ours.adjust(logits(), history(5, seen=seen)), theirs)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.05, 5),
    k=st.none() | st.integers(1, 50),
    p=st.none() | st.floats(0.01, 1),
    least=st.none() | st.floats(0, 1),
)
def test_best_token_always_survives_and_order_never_changes(
    seed: int, temperature: float, k: int | None, p: float | None, least: float | None
) -> None:
    before = logits(3, 11, seed)
    after = Sampling(temperature=temperature, top_k=k, top_p=p, min_p=least).adjust(before)
    assert torch.equal(after.argmax(-1), before.argmax(-1))
    kept = torch.isfinite(after)
    assert not (torch.where(kept, before, math.inf).amin(-1) < torch.where(kept, -math.inf, before).amax(-1)).any()
    torch.testing.assert_close(after[kept], (before / temperature)[kept])


def test_samples_follow_the_distribution() -> None:
    """Chi-square of 20,000 draws, one per request, against the adjusted softmax."""
    from scipy.stats import chisquare

    draws, row = 20_000, logits(1, 9, seed=4) / 2
    sampling = Sampling(temperature=1.3, top_k=7)
    choice = sampling.choose(row.expand(draws, -1), history(draws), SeededNoise(3))
    probs = sampling.adjust(row).softmax(-1)[0].double()
    counts = torch.bincount(choice.ids_B, minlength=9)
    assert not counts[probs == 0].any()
    kept = probs > 0
    wanted = draws * probs[kept] / probs[kept].sum()
    assert chisquare(counts[kept].numpy(), wanted.numpy()).pvalue > 1e-3


def test_steps_of_one_request_are_independent() -> None:
    from scipy.stats import chi2_contingency

    noise, row = SeededNoise(5), torch.zeros(2000, 3)
    first, second = (Sampling().choose(row, history(2000, step), noise).ids_B for step in (0, 1))
    table = torch.zeros(3, 3)
    table.index_put_((first, second), torch.ones(2000), accumulate=True)
    assert chi2_contingency(table.numpy()).pvalue > 1e-3


def test_noise_depends_on_seed_request_and_step_alone() -> None:
    noise = SeededNoise(7)
    batch = noise.gumbel([3, "a", 8], 5, 100)
    assert batch.shape == (3, 100)
    assert torch.equal(batch[2], SeededNoise(7).gumbel([8], 5, 100)[0])
    assert torch.equal(batch[1, :40], noise.gumbel(["a"], 5, 40)[0])
    others = [SeededNoise(8).gumbel([8], 5, 100), noise.gumbel([9], 5, 100), noise.gumbel([8], 6, 100)]
    assert not any(torch.equal(batch[2], other[0]) for other in others)


def test_number_and_its_spelling_are_two_requests() -> None:
    a, b = SeededNoise(0).gumbel([1, "1"], 0, 10)
    assert not torch.equal(a, b)


def test_greedy_takes_the_best_and_no_noise() -> None:
    choice = Sampling(temperature=0).choose(logits(), history(5), noise=None)  # type: ignore[arg-type]
    assert torch.equal(choice.ids_B, logits().argmax(-1))


def test_recorded_log_probabilities_are_of_both_distributions() -> None:
    rows, sampling = logits(), Sampling(temperature=0.5, top_p=0.8, logprobs=3)
    choice = sampling.choose(rows, history(5), SeededNoise())
    assert choice.logprobs_B is not None and choice.adjusted_B is not None
    for b, token in enumerate(choice.ids_B.tolist()):
        kept = [v for v in range(37) if torch.isfinite(sampling.adjust(rows))[b, v]]
        total = sum(math.exp(float(rows[b, v]) / 0.5) for v in kept)
        assert math.isclose(float(choice.adjusted_B[b]), float(rows[b, token]) / 0.5 - math.log(total), abs_tol=1e-4)
        assert math.isclose(float(choice.logprobs_B[b]), float(rows[b].log_softmax(-1)[token]), abs_tol=1e-5)
    assert choice.best_Bn is not None and torch.equal(choice.best_Bn, rows.topk(3).indices)
    greedy = Sampling(temperature=0, logprobs=0).choose(rows, history(5), SeededNoise())
    assert greedy.adjusted_B is not None and greedy.adjusted_B.eq(0).all() and greedy.best_Bn is None


def test_guides_come_first_and_see_the_history() -> None:
    seen: list[History] = []

    def forbid_the_best(scores: torch.Tensor, history: History) -> torch.Tensor:
        seen.append(history)
        return scores.scatter(-1, scores.argmax(-1, keepdim=True), -math.inf)

    choice = Sampling(temperature=0).choose(logits(), history(5, step=4), SeededNoise(), [forbid_the_best])
    assert torch.equal(choice.ids_B, logits().topk(2).indices[:, 1])
    assert seen[0].step == 4


def test_half_precision_logits_are_adjusted_in_float32() -> None:
    assert Sampling(temperature=0.7).adjust(logits().bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"stop": ["a", ""]}, "stop"),
        ({"topp": 0.5}, "top_p"),
    ],
)
def test_bad_field_is_one_sentence_that_names_it(fields: dict[str, object], names: str) -> None:
    with pytest.raises(TorchstoneError, match=names) as caught:
        validate(Sampling, fields, "sampling")
    assert "\n" not in str(caught.value)


def test_stop_may_be_one_text() -> None:
    assert Sampling(stop="end").stop == ("end",)  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        Sampling(stop=3)  # type: ignore[arg-type]
