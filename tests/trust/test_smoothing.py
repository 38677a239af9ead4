"""Certificates: bounds by naive definitions, radii that are known, soundness, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import tiny
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.train import training
from torchstone.trust.model._classifier import Classified
from torchstone.trust.smoothing import (
    ABSTAIN,
    Certified,
    SmoothedClassifier,
    average_certified_radius,
    bernstein,
    certified_accuracy,
    clopper_pearson,
    largest_radius,
)

ALPHA = 0.001


class Plane:
    """Class 1 where w.x + b > 0: smoothed it has the same classes, and the radius |w.x + b| / |w|."""

    w = torch.tensor([3.0, -4.0])
    b = 0.5

    def __call__(self, x: torch.Tensor) -> Classified:
        z = x @ self.w.to(x) + self.b
        return Classified(torch.stack([-z, z], 1), x)

    def radius(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.w + self.b).abs() / self.w.norm()


def points(count: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------------------- bounds


@given(st.integers(1, 12), st.data())
def test_clopper_and_pearson_is_where_so_many_votes_have_probability_alpha(n: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, n))
    low = clopper_pearson(count, n, ALPHA)
    if count == 0:
        assert low == 0
        return
    p = Fraction(low)
    tail = sum(math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(count, n + 1))
    assert float(tail) == pytest.approx(ALPHA, rel=1e-6)


def test_all_votes_certify_the_largest_radius() -> None:
    for n in (1000, 100_000):
        assert clopper_pearson(n, n, ALPHA) == pytest.approx(ALPHA ** (1 / n), rel=1e-12)
        assert largest_radius(0.25, n, ALPHA) == pytest.approx(0.25 * stats.norm.ppf(ALPHA ** (1 / n)))
    assert largest_radius(0.25, 100_000, ALPHA) == pytest.approx(0.953, abs=1e-3)
    assert largest_radius(0.25, 9, ALPHA) == 0 < largest_radius(0.25, 10, ALPHA)
    assert 0 < largest_radius(0.25, 1000, ALPHA, soft=True) < largest_radius(0.25, 1000, ALPHA)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40))
def test_bernstein_by_hand(values: list[float]) -> None:
    n, mean = len(values), sum(values) / len(values)
    pairs = sum((a - b) ** 2 / 2 for i, a in enumerate(values) for b in values[:i]) / (n * (n - 1) / 2)
    log = math.log(2 / ALPHA)
    wanted = mean - math.sqrt(2 * pairs * log / n) - 7 * log / (3 * (n - 1))
    found = bernstein(sum(values), sum(v * v for v in values), n, ALPHA)
    assert found == pytest.approx(max(0.0, wanted), abs=1e-6)


def test_bounds_are_rarely_wrong() -> None:
    """At alpha 0.2, of 400 draws of a known mean."""
    generator, alpha, n = Key(5).generator(), 0.2, 300
    draws = torch.rand(400, n, generator=generator, dtype=torch.float64)
    votes = [clopper_pearson(int(row.lt(0.6).sum()), n, alpha) > 0.6 for row in draws]
    soft = [bernstein(float(row.sqrt().sum()), float(row.sum()), n, alpha) > 2 / 3 for row in draws]
    assert 0.1 < sum(votes) / 400 < 0.26 and sum(soft) / 400 < 0.2


# --------------------------------------------------------------------------------------------------------- certificates


@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_a_plane_has_the_radius_of_its_distance(sigma: float) -> None:
    plane, n = Plane(), 20_000
    # in places where samples are neither nearly all of one class nor nearly half of each
    x = torch.stack([plane.w / 5 * (t * sigma) - plane.w * plane.b / 25 for t in (-2.0, -1.0, 0.7, 1.5)])
    found = SmoothedClassifier(plane, sigma).certify(x, n=n)
    assert torch.equal(found.label, (x @ plane.w + plane.b > 0).long())
    assert (found.radius <= plane.radius(x)).all() and (found.radius >= 0.9 * plane.radius(x)).all()


@pytest.mark.slow
def test_a_plane_with_a_hundred_thousand_samples() -> None:
    plane, x, sigma, n = Plane(), points(30), 0.5, 100_000
    found, most = SmoothedClassifier(plane, sigma).certify(x, n=n), largest_radius(sigma, n, ALPHA)
    assert (found.radius <= plane.radius(x)).all() and (found.radius <= most).all()
    clear = (plane.radius(x) < 0.8 * most) & (plane.radius(x) > 0.2 * sigma)
    assert clear.sum() > 8 and (found.radius >= 0.9 * plane.radius(x))[clear].all()


def test_it_abstains_just_where_the_bound_is_at_most_a_half() -> None:
    plane, x, n = Plane(), 0.1 * points(25), 400
    smoothed = SmoothedClassifier(plane, 0.5)
    found = smoothed.certify(x, n=n)
    abstains = found.label == ABSTAIN
    assert abstains.any() and not abstains.all()
    for row, example in enumerate(x):
        key = Key(0).fold("smoothing")
        chosen = smoothed._sums(example, 100, None, key.fold("choose", row))[0].argmax()
        votes_C, _ = smoothed._sums(example, n, None, key.fold("bound", row))
        low = clopper_pearson(int(votes_C[chosen]), n, ALPHA)
        if not abstains[row]:
            assert found.radius[row].item() == pytest.approx(0.5 * stats.norm.ppf(low)) and low > 0.5
        else:
            assert found.radius[row] == 0 and low <= 0.5


class Curved:
    """Three classes over the plane with curved borders; logits of moderate size."""

    def __call__(self, x: torch.Tensor) -> Classified:
        a, b = x[:, 0], x[:, 1]
        return Classified(torch.stack([2 * a - b * b, 2 * (b + torch.sin(2 * a)), 1.0 - a * a], 1), x)


@pytest.mark.parametrize("beta", [None, 2.0], ids=["votes", "soft"])
def test_no_attack_within_the_radius_changes_the_smoothed_class(beta: float | None) -> None:
    """The smoothed classifier is integrated on a grid here, and attacked along the gradient of its probability."""
    sigma, step = 0.5, 0.1
    axis = torch.arange(-2.5, 2.5 + step, step, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    weight = (-grid.square().sum(1) / (2 * sigma**2)).exp()
    weight /= weight.sum()

    def smooth(x: torch.Tensor, soft: float | None) -> torch.Tensor:
        logits = Curved()((x[:, None] + grid).flatten(0, 1)).logits
        each = torch.nn.functional.one_hot(logits.argmax(1), 3).double() if soft is None else (soft * logits).softmax(1)
        return (each.unflatten(0, (len(x), -1)) * weight[:, None]).sum(1)

    x = points(100, 3).double()
    found = SmoothedClassifier(Curved(), sigma).certify(x, n=1000, beta=beta)
    sure = found.label != ABSTAIN
    x, label, radius = x[sure], found.label[sure], found.radius[sure][:, None]
    assert len(x) > 60 and torch.equal(smooth(x, beta).argmax(1), label)
    moved = x.clone()
    for _ in range(8):
        moved.requires_grad_()
        # a soft stand-in has a gradient where votes have none
        p = smooth(moved, beta or 5.0).gather(1, label[:, None]).sum()
        (slope,) = torch.autograd.grad(p, moved)
        away = moved.detach() - 0.4 * radius * slope / slope.norm(dim=1, keepdim=True).clamp(min=1e-12) - x
        moved = x + away * (0.999 * radius / away.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
        assert torch.equal(smooth(moved, beta).argmax(1), label)
    assert ((moved - x).norm(dim=1) > 0.9 * radius[:, 0]).double().mean() > 0.8  # the attack went as far as it may
    further = x + 6 * (moved - x)
    assert not torch.equal(smooth(further, beta).argmax(1), label)  # it can change classes, beyond


def test_an_example_is_the_same_alone_and_in_any_batch() -> None:
    smoothed, x = SmoothedClassifier(Curved(), 0.5), points(6).double()
    whole = smoothed.certify(x, n=600, key=Key(3))
    for row in range(6):
        alone = smoothed.certify(x[row : row + 1], n=600, key=Key(3), first=row)
        assert alone.label[0] == whole.label[row] and alone.radius[0] == whole.radius[row]
    other = smoothed.certify(x, n=600, key=Key(4))
    assert not torch.equal(other.radius, whole.radius)


def test_the_class_and_its_bound_have_samples_of_their_own() -> None:
    seen: list[torch.Tensor] = []

    def watch(x: torch.Tensor) -> Classified:
        seen.append(x)
        return Curved()(x)

    SmoothedClassifier(watch, 0.5).certify(torch.zeros(2, 2), n0=20, n=20)
    rows = torch.cat(seen)
    assert len(rows) == 80 and len(rows.unique(dim=0)) == 80
    assert rows.std().item() == pytest.approx(0.5, rel=0.2)


def test_predictions_are_the_class_or_none() -> None:
    plane, x = Plane(), torch.cat([points(20), -Plane.w[None] * Plane.b / 25])  # the last is on the border
    found = SmoothedClassifier(plane, 0.5).predict(x, n=300)
    said = found != ABSTAIN
    assert torch.equal(found[said], (x @ plane.w + plane.b > 0).long()[said])
    assert said.sum() > 10 and not said[-1]


def test_the_average_radius_is_the_integral_of_certified_accuracy() -> None:
    generator = Key(1).generator()
    label = torch.randint(-1, 3, (200,), generator=generator)
    radius = torch.where(label == ABSTAIN, 0.0, torch.rand(200, generator=generator, dtype=torch.float64))
    found, truth = Certified(label, radius), torch.randint(3, (200,), generator=generator)
    acr = sum(r for r, c, y in zip(radius.tolist(), label.tolist(), truth.tolist(), strict=True) if c == y) / 200
    assert average_certified_radius(found, truth) == pytest.approx(acr)
    share = certified_accuracy(found, truth, [(i + 0.5) / 4000 for i in range(4000)])
    assert sum(share) / 4000 == pytest.approx(acr, abs=1e-3)
    assert certified_accuracy(found, truth, [0.0]) == [(label == truth).double().mean().item()]


def test_refusals_are_sentences() -> None:
    smoothed, x = SmoothedClassifier(Plane(), 0.5), points(2)
    for ids in (torch.zeros(2, 4, dtype=torch.uint8), torch.zeros(2, 4, dtype=torch.long)):
        with pytest.raises(TorchstoneError, match=r"pixels from 0 to 1, or of token ids their embeddings"):
            smoothed.certify(ids)
    for sigma in (0, -1, math.nan, math.inf):
        with pytest.raises(TorchstoneError, match="sigma: is"):
            SmoothedClassifier(Plane(), sigma)
    for alpha in (0, 1, math.nan):
        with pytest.raises(TorchstoneError, match="alpha: is"):
            smoothed.predict(x, alpha=alpha)
    with pytest.raises(TorchstoneError, match="x is a ndarray; give a tensor of floats"):
        smoothed.certify(x.numpy())  # type: ignore[arg-type]
    for fields in ({"n": 0}, {"n0": 0}, {"n": 1e3}, {"n0": 2.5}):
        with pytest.raises(TorchstoneError, match="must be a whole number of 1 or more"):
            smoothed.certify(x, **fields)
    for fields in ({"beta": 0.0}, {"beta": 2.0, "n": 1}):
        with pytest.raises(TorchstoneError, match="beta above 0 and n above 1"):
            smoothed.certify(x, **fields)
    with pytest.raises(TorchstoneError, match=r"call eval\(\)"):
        SmoothedClassifier(torch.nn.Linear(2, 2), 0.5).certify(x)
    with pytest.raises(TorchstoneError, match="has one class"):
        SmoothedClassifier(lambda x: Classified(x[:, :1], x), 0.5).certify(x)
    with pytest.warns(UserWarning, match="n 9 certifies nothing at alpha 0.001: the largest radius is 0"):
        assert (smoothed.certify(x, n=9).label == ABSTAIN).all()


# ----------------------------------------------------------------------------------------------------------------- verb

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained with noise in ``run`` and one without in ``plain``."""
    folder = tmp_path_factory.mktemp("smoothing")
    more = {"optimizer": {"lr": 0.01}, "trainer": {"steps": 40, "batch": 16, "save_every": 40}}
    noisy = {**tiny.images(folder, **more), "objective": {"kind": "macer", "sigma": 0.2, "copies": 4, "weight": 1}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "plot_curve", lambda *arguments: None)
        training.train(noisy, out=folder / "run", quiet=True)
        training.train(tiny.images(folder, trainer={"steps": 1}), out=folder / "plain", quiet=True)
    return folder


@pytest.mark.parametrize("soft", [(), ("--beta", "16")], ids=["votes", "soft"])
def test_a_run_is_certified_and_the_report_written(soft: tuple[str, ...], cli: Cli, home: Path, tmp_path: Path) -> None:
    before = tiny.listing(home / "run")
    command = ("trust", "certify", home / "run", "--n", "600", "--limit", "10", *soft)
    said = cli(*command, "--out", tmp_path / "out", "--radius", "0", "--radius", "0.1", "--json")
    assert said.status == 0 and said.err == ""
    found = json.loads(said.out)
    assert found == json.loads((tmp_path / "out" / "certified.json").read_text())
    assert found["examples"] == 10 and found["sigma"] == 0.2 and found["radii"] == [0, 0.1]
    assert max(found["radius"]) <= found["largest_radius"] and found["certified_accuracy"][0] > 0.5
    right = [r * (c == y) for r, c, y in zip(found["radius"], found["predicted"], found["label"], strict=True)]
    assert found["average_certified_radius"] == pytest.approx(sum(right) / 10)
    assert tiny.listing(home / "run") == before
    shown = cli(*command)
    assert shown.status == 0 and "average certified radius" in shown.out and "radius 0.75" in shown.out


def test_too_few_samples_are_one_line_of_warning(cli: Cli, home: Path) -> None:
    said = cli("trust", "certify", home / "run", "--n", "9", "--limit", "3")
    assert said.status == 0 and "abstained 1.0000" in said.out
    assert said.err == "torchstone: n 9 certifies nothing at alpha 0.001: the largest radius is 0\n"


def test_what_the_verb_refuses(cli: Cli, home: Path, tmp_path: Path) -> None:
    def refusal(*arguments: Any) -> str:
        said = cli("trust", "certify", *arguments)
        assert said.status == 2 and said.out == "" and said.err.count("\n") == 1
        return str(said.err)

    assert "no such run" in refusal(home / "none")
    assert "trained without noise" in refusal(home / "plain")
    assert "sigma: is 0.0" in refusal(home / "run", "--sigma", "0")
    assert "alpha: is 1.0" in refusal(home / "run", "--alpha", "1")
    assert "n: is 0" in refusal(home / "run", "--n", "0")
    assert "limit: is 0" in refusal(home / "run", "--limit", "0")
    for radius in ("-1", "nan", "inf"):
        assert "each a number from 0 up" in refusal(home / "run", "--radius", radius)
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(home / "run", "--out", tmp_path / "file")
    tiny.saved(tmp_path / "text", tiny.recipe(tmp_path))
    assert "no classifier of images" in refusal(tmp_path / "text")
