"""Rejection: scores by hand, metrics by naive loops, the theorem, and what a rejecting classifier answers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchstone.data.images import Images
from torchstone.errors import TorchstoneError
from torchstone.spec import resolve, validate
from torchstone.train.run import build_model
from torchstone.trust import RejectingClassifier
from torchstone.trust.model._classifier import Classified
from torchstone.trust.rejection import (
    accuracy_at,
    auc,
    calibrate,
    coupled,
    ideal_auxiliary,
    scores_of,
    xi_error,
)


def test_scores_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]]).double()
    out = Classified(logits, logits, torch.tensor([0.5, 0.25]).double())
    found = scores_of(out)
    for row, values in enumerate(logits.tolist()):
        total = sum(math.exp(v) for v in values)
        probs = [math.exp(v) / total for v in values]
        assert found.con[row].item() == pytest.approx(max(probs))
        assert found.entropy[row].item() == pytest.approx(sum(p * math.log(p) for p in probs))
        assert found.energy[row].item() == pytest.approx(math.log(total))
        assert found.rcon is not None and found.auxiliary is not None
        assert found.rcon[row].item() == pytest.approx(max(probs) * (0.5, 0.25)[row])
    assert set(scores_of(Classified(logits, logits)).items()) == {"con", "entropy", "energy"}


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=30))
def test_auc_is_the_share_of_ordered_pairs(rows: list[tuple[int, bool]]) -> None:
    score, right = torch.tensor([a for a, _ in rows]).float(), torch.tensor([b for _, b in rows])
    pairs = list(itertools.product([a for a, b in rows if b], [a for a, b in rows if not b]))
    found = auc(score, right)
    if not pairs:
        assert math.isnan(found)
        return
    assert found == pytest.approx(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs))
    assert auc(score.exp() * 3 - 1, right) == pytest.approx(found)
    assert auc(-score, right) == pytest.approx(1 - found)


@pytest.mark.parametrize("count", [1, 7, 20, 100, 333])
@pytest.mark.parametrize("keep", [0.5, 0.95, 0.99, 1.0])
def test_a_threshold_keeps_its_share_and_is_the_largest_that_does(count: int, keep: float) -> None:
    score = torch.rand(count + 50, generator=torch.Generator().manual_seed(count))
    right = torch.arange(count + 50) < count
    threshold = calibrate(score, right, keep)
    kept = int((score[right] >= threshold).sum())
    assert keep * count - 1e-6 <= kept < keep * count + 1
    assert int((score[right] > threshold).sum()) < keep * count


def test_accuracy_at_a_share_by_hand() -> None:
    score = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    right = torch.tensor([True, False, True, False, True, True])
    assert accuracy_at(score, right, 0.5) == pytest.approx(2 / 3)  # the two best of four right ones, and one wrong
    assert accuracy_at(score, right, 1.0) == pytest.approx(4 / 6)
    assert math.isnan(accuracy_at(score, torch.zeros(6, dtype=torch.bool)))


def test_the_coupled_rule_and_its_bounds() -> None:
    con, rcon = torch.tensor([0.6, 0.6, 0.9, 0.5]), torch.tensor([0.55, 0.45, 0.51, 0.51])
    assert coupled(con, rcon).tolist() == [True, False, True, False]
    assert coupled(con, rcon, 0.5).tolist() == [False, False, True, False]  # Con > 2/3
    for xi in (-0.1, 1.0, math.nan):
        with pytest.raises(TorchstoneError, match=r"outside \[0, 1\)"):
            coupled(con, rcon, xi)


def test_with_the_ideal_head_half_divides_right_from_wrong() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = (torch.randn(100_000, 4, generator=generator).double() * 3).softmax(1)
    label = torch.randint(4, (100_000,), generator=generator)
    con, ideal = probs.amax(1), ideal_auxiliary(probs, label)
    right = probs.argmax(1) == label
    assert ((ideal >= 0) & (ideal <= 1)).all() and (ideal[right] == 1).all()
    sure = con > 0.5
    assert torch.equal((con * ideal > 0.5)[sure], right[sure])


@given(
    st.floats(0.501, 0.999), st.floats(0, 1), st.floats(0, 0.99), st.floats(-1, 1), st.booleans(), st.booleans()
)  # fmt: skip
def test_the_theorem(con: float, share: float, xi: float, u: float, right: bool, ratio: bool) -> None:
    """Con, T-Con = Con or a share of what is left of 1, A anywhere within xi."""
    ideal = 1.0 if right else share * (1 - con) / con
    a = ideal * (2 / (2 - xi)) ** u if ratio else ideal + u * xi / 2
    a = min(1.0, max(0.0, a))
    if con > 1 / (2 - xi) + 1e-12:
        assert (con * a > 0.5) == right


@given(st.floats(0.05, 1.0), st.floats(0.05, 1.0))
def test_the_error_of_a_head_is_the_smallest_that_fits(a: float, ideal: float) -> None:
    xi = xi_error(*torch.tensor([[a], [ideal]], dtype=torch.float64)).item()

    def fits(x: float) -> bool:
        return abs(a - ideal) <= x / 2 or abs(math.log(a / ideal)) <= math.log(2 / (2 - x))

    assert fits(min(xi + 1e-9, 1.99)) and (xi < 1e-9 or not fits(xi - 1e-9))


# -------------------------------------------------------------------------------------------------------- classifier


def model_of(**fields: Any) -> Any:
    sizes = {"classes": 3, "channels": 1, "image": 4, "hidden": [8]}
    return build_model(validate(resolve("model", "mlp"), {**sizes, "rejection": {}, **fields}), 0)  # type: ignore[arg-type]


def examples(model: Any, count: int = 60) -> dict[str, torch.Tensor]:
    pixels = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        label = model.eval()(pixels).logits.argmax(1)
    return {"pixels": pixels, "label": torch.where(torch.arange(count) % 3 == 0, (label + 1) % 3, label)}


@pytest.mark.parametrize("score", ["con", "rcon", "auxiliary", "entropy", "energy"])
def test_a_calibrated_classifier_keeps_its_share_of_right_answers(score: str) -> None:
    model = model_of()
    batch = examples(model)
    halves = [{name: value[a:b] for name, value in batch.items()} for a, b in ((0, 25), (25, 60))]
    classifier = RejectingClassifier(model).calibrate(halves, keep=0.8, score=score)
    label, accepted, scores = classifier(batch["pixels"])
    right = label == batch["label"]
    assert int((accepted & right).sum()) == 32  # of 40
    assert torch.equal(accepted, getattr(scores, score) >= classifier.threshold)


def test_a_split_of_images_calibrates_as_its_batches_do() -> None:
    model = model_of()
    batch = examples(model, 300)
    split = Images(batch["pixels"].numpy(), batch["label"].numpy(), np.arange(300))
    found = RejectingClassifier(model).calibrate(split, keep=0.9)
    assert found.threshold == RejectingClassifier(model).calibrate(batch, keep=0.9).threshold


def test_without_calibration_the_coupled_rule_decides() -> None:
    model = model_of()
    label, accepted, scores = RejectingClassifier(model, xi=0.2)(examples(model)["pixels"])
    assert scores.rcon is not None and label.shape == accepted.shape == (60,)
    assert torch.equal(accepted, (scores.con > 1 / 1.8) & (scores.rcon > 0.5))


def test_refusals_are_sentences() -> None:
    model = model_of()
    batch = examples(model)
    with pytest.raises(TorchstoneError, match="train with objective rectified_rejection"):
        RejectingClassifier(model_of(rejection=None))
    with pytest.raises(TorchstoneError, match="a classifier of images"):
        RejectingClassifier(torch.nn.Linear(2, 2))
    with pytest.raises(TorchstoneError, match=r"outside \[0, 1\)"):
        RejectingClassifier(model, xi=1)
    wrong = {"pixels": batch["pixels"][::3], "label": batch["label"][::3]}
    with pytest.raises(TorchstoneError, match="none of the examples is classified correctly"):
        RejectingClassifier(model).calibrate(wrong)
    for odd in (3, "pixels", batch["pixels"], [batch["pixels"]], {"pixels": batch["pixels"]}, [{**batch, "label": 1}]):
        with pytest.raises(TorchstoneError, match=r"needs a split of images, as data\.valid, or batches"):
            RejectingClassifier(model).calibrate(odd)
    with pytest.raises(TorchstoneError, match="no example to calibrate on"):
        RejectingClassifier(model).calibrate([])
    with pytest.raises(TorchstoneError, match="score: is one of con, entropy"):
        RejectingClassifier(model).calibrate(batch, score="margin")
    with pytest.raises(TorchstoneError, match="no share above 0"):
        RejectingClassifier(model).calibrate(batch, keep=0)
