"""Tasks whose answers nobody can be sure of: who knows how they are drawn answers as often as can be worked out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.stats import binom

from torchstone.data.episodes import EpisodesSpec
from torchstone.data.two_sources import TwoSourcesSpec

# ------------------------------------------------------------------------------------------------------------ episodes


def examples(count: int, **fields: Any) -> tuple[EpisodesSpec, np.ndarray, np.ndarray]:
    """Values (B, E, F) and labels (B, E) of test episodes."""
    spec = EpisodesSpec(**fields)
    ids_BS, answer_BS = spec.sequences("test", np.arange(count))
    assert ids_BS.shape[1] == spec.block + 1
    ids_BEN = ids_BS.reshape(count, -1, spec.features + 1)
    value_BEF = ids_BEN[..., :-1] - np.arange(spec.features) * spec.values
    label_BE = ids_BEN[..., -1] - spec.features * spec.values
    assert value_BEF.min() == 0 and value_BEF.max() == spec.values - 1, "each feature has ids of its own"
    assert label_BE.min() == 0 and label_BE.max() == spec.labels - 1
    assert answer_BS.reshape(ids_BEN.shape)[..., -1].all() and not answer_BS.reshape(ids_BEN.shape)[..., :-1].any()
    return spec, value_BEF, label_BE


def additive(value_EF: np.ndarray, label_E: np.ndarray, values: int) -> bool:
    """Whether weights of values exist by which the label is 1 where their sum is positive, and 0 where it is not."""
    one_hot_EW = np.concatenate([np.eye(values)[column] for column in value_EF.T], axis=1)
    sign_E = 1 - 2 * label_E
    found = linprog(
        np.zeros(one_hot_EW.shape[1]), sign_E[:, None] * one_hot_EW, -np.ones(len(sign_E)), bounds=(-1e4, 1e4)
    )
    return bool(found.status == 0)


def test_without_flips_labels_follow_a_rule_that_adds_up_and_is_anew_in_every_episode() -> None:
    _, value_BEF, label_BE = examples(30, demonstrations=40, questions=10, features=2, values=4, flips=0)
    assert all(additive(values, labels, 4) for values, labels in zip(value_BEF, label_BE, strict=True))
    assert not additive(value_BEF[0], label_BE[1], 4), "a rule does not fit another episode"
    pairs = value_BEF @ np.array([4, 1])
    rules = {tuple(sorted(set(zip(p, y, strict=True)))) for p, y in zip(pairs.tolist(), label_BE.tolist(), strict=True)}
    assert len(rules) > 25


@pytest.mark.parametrize("labels", [2, 4])
def test_of_one_feature_the_majority_of_its_labels_is_right_as_often_as_counting_says(labels: int) -> None:
    """With two labels the majority of n labels that are right with probability 1 - flips, ties half; with four it is
    only told from chance and from certainty."""
    fields = {"demonstrations": 24, "questions": 6, "features": 1, "values": 4, "labels": labels, "flips": 0.3}
    _, value_BEF, label_BE = examples(1500, **fields)
    value_BE = value_BEF[..., 0]
    seen_BQE = value_BE[:, 24:, None] == value_BE[:, None, :24]
    votes_BQL = np.stack([(seen_BQE & (label_BE[:, None, :24] == y)).sum(2) for y in range(labels)], axis=2)
    best_BQ1 = votes_BQL.max(2, keepdims=True)
    tied_BQL = votes_BQL == best_BQ1
    right = np.take_along_axis(tied_BQL / tied_BQL.sum(2, keepdims=True), label_BE[:, 24:, None], axis=2).mean()
    if labels == 2:
        n = np.arange(25)
        k = np.arange(25)[:, None]
        wins = (binom.pmf(k, n, 0.7) * ((2 * k > n) + 0.5 * (2 * k == n))).sum(0)
        wanted = float((binom.pmf(n, 24, 1 / 4) * wins).sum())
        assert right == pytest.approx(wanted, abs=0.015)
    else:
        assert 0.85 < right < 0.99


def test_demonstrations_are_flipped_as_often_as_asked_to_all_other_labels_alike_and_questions_never() -> None:
    fields = {"demonstrations": 60, "questions": 40, "features": 1, "values": 2, "labels": 3, "flips": 0.4}
    _, value_BEF, label_BE = examples(200, **fields)
    moved = np.zeros(3)
    for value_E, label_E in zip(value_BEF[..., 0], label_BE, strict=True):
        for value in range(2):
            [rule] = set(label_E[60:][value_E[60:] == value])
            moved += np.bincount((label_E[:60][value_E[:60] == value] - rule) % 3, minlength=3)
    assert moved / moved.sum() == pytest.approx([0.6, 0.2, 0.2], abs=0.015)


# --------------------------------------------------------------------------------------------------------- two sources


def optimal(spec: TwoSourcesSpec, ids_BS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What who knows the grammars makes of pairs: nats of each next one (B, S - 1), and the probability that the first
    source is informative, given all up to there (B, S). The forward algorithm of a hidden Markov model."""
    N, stays = spec.symbols, np.array([[1 - spec.switch, spec.switch], [spec.switch, 1 - spec.switch]])
    moves_2NN = np.zeros((2, N, N))
    for source in range(2):
        np.put_along_axis(moves_2NN[source], spec.grammar(source), 1 / spec.branches, 1)
    symbol_2BS = np.stack([ids_BS // N, ids_BS % N])
    belief_B2, nats, beliefs = np.full((len(ids_BS), 2), 0.5), [], [np.full(len(ids_BS), 0.5)]
    for s in range(1, ids_BS.shape[1]):
        likely = [moves_2NN[i][symbol_2BS[i, :, s - 1], symbol_2BS[i, :, s]] / N for i in range(2)]
        joint_B2 = belief_B2 @ stays * np.stack(likely, 1)
        nats.append(-np.log(joint_B2.sum(1)))
        belief_B2 = joint_B2 / joint_B2.sum(1, keepdims=True)
        beliefs.append(belief_B2[:, 0])
    return np.stack(nats, 1), np.stack(beliefs, 1)


def test_pairs_are_as_hard_to_predict_as_the_grammars_say() -> None:
    """The optimal predictor's nats lie between those of who is told the source and chance, and it is sure rightly."""
    spec, number_B = TwoSourcesSpec(symbols=6, branches=2, switch=0.1, length=40), np.arange(800)
    ids_BS, informs_BS = spec.sequences("test", number_B)[0], spec.informative("test", number_B)
    nats_BS, belief_BS = optimal(spec, ids_BS)
    assert np.isfinite(nats_BS).all(), "no pair is impossible"
    assert math.log(6 * 2) + 0.1 < nats_BS.mean() < math.log(36) - 0.7
    for low, high in ((0.0, 0.2), (0.2, 0.8), (0.8, 1.01)):
        there = (low <= belief_BS) & (belief_BS < high)
        assert informs_BS[there].mean() == pytest.approx(belief_BS[there].mean(), abs=0.03)


def test_the_informative_source_follows_its_grammar_and_the_other_is_uniform() -> None:
    spec, number_B = TwoSourcesSpec(symbols=6, branches=2, switch=0.25, length=50), np.arange(400)
    ids_BS, informs_BS = spec.sequences("valid", number_B)[0], spec.informative("valid", number_B)
    assert (informs_BS[:, 1:] != informs_BS[:, :-1]).mean() == pytest.approx(0.25, abs=0.01)
    assert informs_BS[:, 0].mean() == pytest.approx(0.5, abs=0.08)
    for source, symbol_BS in enumerate((ids_BS // 6, ids_BS % 6)):
        successors_NK = spec.grammar(source)
        assert all(len(set(row)) == 2 for row in successors_NK.tolist())
        hit_BSK = successors_NK[symbol_BS[:, :-1]] == symbol_BS[:, 1:, None]
        ruled_BS = (informs_BS if source == 0 else ~informs_BS)[:, 1:]
        assert hit_BSK[ruled_BS].mean(0) == pytest.approx([0.5, 0.5], abs=0.02)
        free = np.bincount(symbol_BS[:, 1:][~ruled_BS], minlength=6)
        assert free / free.sum() == pytest.approx(np.full(6, 1 / 6), abs=0.015)


def test_another_grammar_of_one_source_leaves_the_other_as_it_was() -> None:
    one, other = TwoSourcesSpec(seed=3), TwoSourcesSpec(seed=3, grammars=(0, 1))
    assert np.array_equal(one.grammar(0), other.grammar(0)) and not np.array_equal(one.grammar(1), other.grammar(1))
    assert not np.array_equal(one.grammar(0), one.grammar(1))
    assert not np.array_equal(one.grammar(0), TwoSourcesSpec(seed=4).grammar(0))
    ids, changed = (spec.sequences("train", np.arange(300))[0] for spec in (one, other))
    assert (ids // 8 == changed // 8).all(1).mean() > 0.5, "most are drawn alike; the rest went to another split"
    assert (ids % 8 != changed % 8).any(1).all()


def test_where_a_source_is_informative_belongs_to_the_same_examples_whatever_else_is_asked() -> None:
    spec, some_B = TwoSourcesSpec(length=5), np.array([7, 3, 11])
    whole = spec.informative("test", np.arange(12))
    assert np.array_equal(spec.informative("test", some_B), whole[some_B])
    assert spec.sequences("test", some_B)[1].all(), "every next pair is asked for, before as after"
