"""Attacks on functions whose worst pixels are known, and that they leave a model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchstone.keys import Key
from torchstone.model.taps import Taps
from torchstone.spec import resolve
from torchstone.train.run import build_model
from torchstone.trust.attacks import (
    Ball,
    adaptive_gain,
    adaptive_pgd,
    ascend,
    carlini_wagner,
    cross_entropy_gain,
    divergence_gain,
    gama,
    log_rcon,
    margin,
    multi_target,
    pgd,
    shortfalls,
    uniform,
)
from torchstone.trust.model._classifier import Classified


class Linear:
    """logits = W (x - 1/2), and A = sigmoid(v (x - 1/2)): a callable that is no module."""

    def __init__(self, classes: int = 3, inputs: int = 8, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.w_CP = torch.randn(classes, inputs, generator=generator, dtype=torch.float64)
        self.v_P = torch.randn(inputs, generator=generator, dtype=torch.float64)

    def __call__(self, pixels: torch.Tensor) -> Classified:
        flat_BP = pixels.flatten(1) - 0.5
        return Classified(flat_BP @ self.w_CP.T, flat_BP, torch.sigmoid(flat_BP @ self.v_P))


def inner(rows: int = 5, inputs: int = 8, seed: int = 1) -> torch.Tensor:
    """Pixels from 0.4 to 0.6: no ball of 0.1 around them meets 0 or 1."""
    return 0.4 + 0.2 * torch.rand(rows, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("key", [None, Key(4)])
def test_on_a_linear_gain_pgd_ends_in_the_corner(key: Key | None) -> None:
    w_P, x = torch.tensor([1.0, -2.0, 0.5, -0.1]).double(), inner(6, 4)
    found = pgd(lambda pixels: pixels @ w_P, x, Ball(0.1), steps=20, restarts=3, key=key)
    torch.testing.assert_close(found, x + 0.1 * w_P.sign(), rtol=0, atol=1e-12)


def test_two_classes_are_attacked_along_the_difference_of_their_weights() -> None:
    model, x = Linear(2), inner()
    label = model(x).logits.argmax(1)
    found = pgd(cross_entropy_gain(model, label), x, Ball(0.05), steps=10)
    away = model.w_CP[1 - label] - model.w_CP[label]
    torch.testing.assert_close(found, x + 0.05 * away.sign(), rtol=0, atol=1e-12)
    change = margin(model(found).logits, label) - margin(model(x).logits, label)
    torch.testing.assert_close(change, 0.05 * away.abs().sum(1))


def test_pixels_stay_in_the_ball_and_what_a_pixel_may_be() -> None:
    x = torch.rand(40, 1, 3, 3, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    found = pgd(lambda pixels: (pixels * 7).sin().flatten(1).sum(1), x, Ball(0.3), steps=7, step_size=0.2, key=Key(0))
    assert (found - x).abs().max() <= 0.3 + 1e-6 and found.min() >= 0 and found.max() <= 1
    assert (found == 0).any() or (found == 1).any()


def test_zero_steps_give_the_start_in_the_ball() -> None:
    x = inner(2, 3)
    assert torch.equal(ascend(lambda p: p.sum(1), x, x + 9, Ball(0.1), 0, 1.0), Ball(0.1).project(x + 9, x))
    assert torch.equal(pgd(lambda p: p.sum(1), x, Ball(0.0), steps=3), x)


def test_of_restarts_each_example_keeps_its_best() -> None:
    def bumpy(pixels: torch.Tensor) -> torch.Tensor:
        return (pixels * 60).sin().sum(1)

    x = inner(30, 3)
    each = [pgd(bumpy, x, Ball(0.1), 20, 0.004, restarts=n, key=Key(1)) for n in (1, 2, 6)]
    gained = [bumpy(one) for one in each]
    assert (gained[1] >= gained[0]).all() and (gained[2] >= gained[1]).all() and (gained[2] > gained[0]).any()
    alone = [
        bumpy(ascend(bumpy, x, x + uniform(x, 0.1, Key(1).fold("restart", n)), Ball(0.1), 20, 0.004)) for n in range(6)
    ]
    torch.testing.assert_close(gained[2], torch.stack(alone).amax(0))


def test_noise_is_uniform_in_the_ball_and_the_keys() -> None:
    x = torch.zeros(100, 1, 10, 10)
    noise = uniform(x, 0.2, Key(7))
    assert noise.abs().max() <= 0.2 and abs(noise.mean().item()) < 0.005
    assert noise.std().item() == pytest.approx(0.2 / 3**0.5, rel=0.02)
    assert torch.equal(noise, uniform(x, 0.2, Key(7))) and not torch.equal(noise, uniform(x, 0.2, Key(8)))


def test_gains_are_their_formulas() -> None:
    model, x = Linear(), inner(4)
    label, out = torch.tensor([0, 2, 1, -100]), Linear()(x)
    p_BC = out.logits.softmax(1)
    found = cross_entropy_gain(model, label)(x)
    for row in range(3):
        assert found[row].item() == pytest.approx(-p_BC[row, label[row]].log().item())
    assert found[3] == 0
    other = inner(4, seed=9)
    q_BC = model(other).logits.softmax(1)
    kl = [sum((p * (p / q).log()).item() for p, q in zip(p_BC[b], q_BC[b], strict=True)) for b in range(4)]
    assert divergence_gain(model, out.logits)(other).tolist() == pytest.approx(kl)
    assert out.auxiliary is not None
    rcon = p_BC.amax(1) * out.auxiliary
    torch.testing.assert_close(log_rcon(out), rcon.log())
    known = label.clamp(min=0)
    wanted = cross_entropy_gain(model, known)(x) + 0.5 * rcon.log()
    torch.testing.assert_close(adaptive_gain(model, known, 0.5)(x), wanted)


def test_at_eta_one_a_right_prediction_is_attacked_through_the_head_alone() -> None:
    model, x = Linear(), inner()
    gain = adaptive_gain(model, model(x).logits.argmax(1), 1.0)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(gain(x).sum(), x)
    (of_head,) = torch.autograd.grad(model(x).auxiliary.log().sum(), x)  # type: ignore[union-attr]
    torch.testing.assert_close(slope, of_head, atol=1e-12, rtol=0)


def test_the_adaptive_attack_keeps_the_wrong_run_that_is_trusted_most() -> None:
    model, x = Linear(4, 12), inner(20, 12)
    label, ball, key = model(x).logits.argmax(1), Ball(0.08), Key(3)
    found = model(adaptive_pgd(model, x, label, ball, (0.1, 1.0), 20, key=key))
    runs = [
        model(pgd(adaptive_gain(model, label, eta), x, ball, 20, key=key.fold("eta", n)))
        for n, eta in enumerate((0.1, 1.0))
    ]
    wrong = torch.stack([run.logits.argmax(1) != label for run in runs])
    assert wrong.any() and not wrong.all()
    assert torch.equal(found.logits.argmax(1) != label, wrong.any(0))
    for row in range(20):
        trusted = [log_rcon(run)[row].item() for run, mine in zip(runs, wrong, strict=True) if mine[row]]
        if trusted:
            assert log_rcon(found)[row].item() == pytest.approx(max(trusted))


def test_multi_target_finds_the_best_wrong_class_of_a_linear_model() -> None:
    model, x, ball = Linear(5, 10), inner(12, 10), Ball(0.05)
    label = model(x).logits.argmax(1)
    best = torch.full((12,), -torch.inf).double()
    for target in range(5):
        away = model.w_CP[target] - model.w_CP[label]
        gained = ((x - 0.5) * away).sum(1) + 0.05 * away.abs().sum(1)
        best = torch.where(label == target, best, torch.maximum(best, gained))
    found = margin(model(multi_target(model, x, label, ball, targets=4, steps=20)).logits, label)
    torch.testing.assert_close(found, best)


@pytest.mark.parametrize("key", [None, Key(3)])
def test_gama_without_weight_is_pgd_on_the_margin_of_probabilities(key: Key | None) -> None:
    model, x, ball = Linear(4, 10), inner(8, 10), Ball(0.1)
    label = model(x).logits.argmax(1)
    start = x if key is None else x + 0.1 * uniform(x, 1.0, key.fold("restart", 0)).sign()
    wanted = start
    for steps, size in ((12, 0.2), (5, 0.02), (3, 0.002)):  # 60 %, 25 % and 15 % of twenty
        wanted = ascend(lambda p: margin(model(p).logits.softmax(1), label), x, wanted, ball, steps, size)
    assert torch.equal(gama(model, x, label, ball, 20, weight=0.0, key=key), wanted)


def test_gama_is_its_formula_step_by_step() -> None:
    model, x = Linear(4, 10), inner(8, 10)
    label, clean = model(x).logits.argmax(1), model(x).logits.softmax(1)
    wanted = x + 0.1 * uniform(x, 1.0, Key(5).fold("restart", 0)).sign()
    weights = [30.0, 20.0, 10.0, 0.0, 0, 0, 0, 0, 0, 0, 0, 0]
    sizes = [0.2] * 8 + [0.02] * 3 + [0.002]  # from step 7.2 and step 10.2 on
    for weight, size in zip(weights, sizes, strict=True):
        wanted = wanted.detach().requires_grad_()
        p = model(wanted).logits.softmax(1)
        of_label = torch.nn.functional.one_hot(label, 4).bool()
        gain = p.masked_fill(of_label, 0).amax(1) - p[of_label] + weight * ((p - clean) ** 2).sum(1)
        (slope,) = torch.autograd.grad(gain.sum(), wanted)
        wanted = torch.clamp(wanted + size * slope.sign(), x - 0.1, x + 0.1)
    found = gama(model, x, label, Ball(0.1), 12, weight=30.0, key=Key(5))
    torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=1e-12)
    assert not torch.equal(found, gama(model, x, label, Ball(0.1), 1, weight=0.0, key=Key(5)))


def test_gama_stays_in_the_ball_and_keeps_the_best_restart() -> None:
    model = Linear(4, 9)
    x = torch.rand(40, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).round(decimals=1)
    label = model(x).logits.argmax(1)
    found = [gama(model, x, label, Ball(0.3), 8, restarts=n, key=Key(0)) for n in (1, 4)]
    for one in found:
        assert (one - x).abs().max() <= 0.3 + 1e-12 and one.min() >= 0 and one.max() <= 1
        assert (one == 0).any() and (one == 1).any()
    few, many = (margin(model(one).logits.softmax(1), label) for one in found)
    assert (many >= few).all()


def test_gama_makes_more_predictions_wrong_than_noise_does() -> None:
    """Of a small network that has learned which of three stripes is bright."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(3, (240,), generator=generator)
    x = 0.6 * torch.rand(240, 1, 6, 6, generator=generator)
    x[torch.arange(240), 0, 2 * label] += 0.4
    fields = {"classes": 3, "channels": 1, "image": 6, "hidden": [16]}
    model: Any = build_model(resolve("model", "mlp").model_validate(fields), 0)
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        adam.zero_grad()
        torch.nn.functional.cross_entropy(model(x).logits, label).backward()
        adam.step()
    right = [
        (model(one).logits.argmax(1) == label).double().mean().item()
        for one in (x, (x + uniform(x, 0.15, Key(1))).clamp(0, 1), gama(model, x, label, Ball(0.15), 20, key=Key(1)))
    ]
    assert right[1] > 0.9 and right[2] < right[1] - 0.2


def test_carlini_wagner_is_as_near_as_the_plane_between_two_classes() -> None:
    model, x = Linear(2, 8), inner(6)
    label = model(x).logits.argmax(1)
    w_BP = model.w_CP[1 - label] - model.w_CP[label]
    exact = -margin(model(x).logits, label) / w_BP.norm(dim=1)  # the plane's distance; no pixel meets 0 or 1 there
    found, distance = carlini_wagner(shortfalls(model, label), x, searches=7, iterations=60, rate=0.03)
    near = x + exact[:, None] * w_BP / w_BP.norm(dim=1, keepdim=True)
    assert ((near > 0) & (near < 1)).all()
    assert (model(found).logits.argmax(1) != label).all()
    assert (distance >= exact).all() and (distance <= exact * 1.03 + 1e-3).all()
    torch.testing.assert_close(distance, (found - x).norm(dim=1))


@pytest.mark.slow
def test_carlini_wagner_with_a_detector_evades_it_too_and_says_where_it_cannot() -> None:
    model, x = Linear(3, 8), inner(8)
    label = model(x).logits.argmax(1)
    _, near = carlini_wagner(shortfalls(model, label), x, 6, 50, 0.03)
    found, distance = carlini_wagner(shortfalls(model, label, 0.4), x, 6, 50, 0.03)
    there = distance.isfinite()
    assert there.any()
    assert (log_rcon(model(found))[there] > torch.tensor(0.4).log()).all()
    assert (model(found).logits.argmax(1) != label)[there].all()
    assert (distance >= near - 1e-2).all()
    assert torch.equal(found[~there], x[~there])
    hopeless, far = carlini_wagner(lambda p: torch.ones(len(p), 1, dtype=p.dtype) + 0 * p.sum(1, keepdim=True), x, 2, 5)
    assert far.isinf().all() and torch.equal(hopeless, x)


@pytest.mark.parametrize("training", [True, False])
def test_an_attack_leaves_gradients_statistics_mode_and_taps_alone(training: bool) -> None:
    fields: dict[str, Any] = {"classes": 3, "channels": 1, "image": 8, "width": 4, "blocks": [1, 1], "rejection": {}}
    model: Any = build_model(resolve("model", "preact_resnet").model_validate(fields), 0).train(training)
    pixels, label = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    model(pixels).logits.sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    taps = Taps(record=["*"])
    model(pixels, taps)
    seen = {name: value.clone() for name, value in taps.seen.items()}
    with torch.no_grad():  # as in evaluation
        found = adaptive_pgd(model, pixels, label, Ball(0.1), steps=2, key=Key(0))
        gama(model, pixels, label, Ball(0.1), steps=2, key=Key(0))
        carlini_wagner(shortfalls(model, label, 0.5), pixels, searches=2, iterations=2)
    assert not found.requires_grad and not torch.equal(found, pixels)
    assert model.training == training and all(p.requires_grad for p in model.parameters())
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(grads)
    assert all(torch.equal(model.get_parameter(name).grad, grad) for name, grad in grads.items())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(torch.equal(taps.seen[name], value) for name, value in seen.items())
