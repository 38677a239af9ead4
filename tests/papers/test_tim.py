"""TIM's layout of BERT-base, counted by hand; the arms and the measurements of its claim of behaviour."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from torchstone.data.two_sources import TwoSourcesSpec
from torchstone.interop.presets import preset
from torchstone.model.measure import measure
from torchstone.model.site import initialise
from torchstone.model.transformer import TransformerSpec
from torchstone.papers import tim
from torchstone.papers._claim import Effect
from torchstone.recipe import load_recipe
from torchstone.spec import validate


@pytest.mark.parametrize("mechanisms", [1, 2, 4])
def test_parameters_in_closed_form(mechanisms: int) -> None:
    layout = preset("tim-bert-base-layout").dump()
    stack = {**layout["stack"], "mechanisms": mechanisms}
    with torch.device("meta"):
        model = validate(TransformerSpec, {**layout, "stack": stack}).build()
    D, F, V, heads, dim, n = 768, 3072, 30522, 2, 32, mechanisms
    norm, biases = 2 * D, 5 * D + F
    plain = 4 * D * D + 2 * D * F + biases + 2 * norm
    ours = (4 * D * D + 2 * D * F) // n + biases + 3 * norm + 4 * D * heads * dim + D + n
    embedding = (V + 512 + 2) * D + norm
    head = D * D + D + norm + V
    assert measure(model).parameters == 3 * plain + 9 * ours + embedding + head
    assert sum(p.numel() for p in model.encoder.layers[2].parameters()) == ours


def arm(name: str) -> Any:
    spec: Any = load_recipe(tim._recipe(tim._SIZES["evidence"], name, 0, 2e-3)).model
    return initialise(spec.model_copy(update={"vocabulary": 64}).build(), 0).eval()


def test_arms_of_the_two_sources_have_as_many_parameters() -> None:
    counts = {name: measure(arm(name)).parameters for name in tim._ARMS}
    assert all(abs(count / counts["plain"] - 1) < 0.03 for count in counts.values()), counts


def test_the_sabotage_arm_sees_each_pair_alone() -> None:
    ids = torch.arange(12)[None]
    other = ids.clone()
    other[0, :-1] += 20
    a, b = (arm("diagonal")(x).logits[0, -1] for x in (ids, other))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    a, b = (arm("tim")(x).logits[0, -1] for x in (ids, other))
    assert (a - b).abs().max() > 1e-4


@torch.no_grad()
def test_the_loss_on_one_source_is_that_of_the_sum_over_the_other() -> None:
    spec, model = TwoSourcesSpec(length=5, examples=7), arm("tim")
    pairs, firsts = [], []
    for batch in spec.prepare().test.evaluation(3):
        shares = model(batch["ids"]).logits.softmax(-1)
        for b, t in np.ndindex(*batch["next"].shape):
            token = int(batch["next"][b, t])
            pairs.append(-math.log(shares[b, t, token]))
            firsts.append(-math.log(sum(float(shares[b, t, 8 * (token // 8) + y]) for y in range(8))))
    assert len(pairs) == 35
    assert tim._losses(model, spec) == pytest.approx((np.mean(pairs), np.mean(firsts)), rel=1e-5)


def test_bits_are_those_of_the_table() -> None:
    informs = np.array([True, True, False, False])
    assert tim._bits(np.array([1, 1, 0, 0]), informs) == pytest.approx(1.0)
    assert tim._bits(np.array([1, 0, 1, 0]), informs) == pytest.approx(0.0)
    assert tim._bits(np.array([0, 0, 0, 0]), informs) == 0.0
    # of the entropy of (3/4, 1/4), what is left where the second is known: half the time one bit
    left = 0.5 * 1.0
    whole = 0.75 * math.log2(4 / 3) + 0.25 * math.log2(4)
    assert tim._bits(np.array([1, 1, 1, 0]), informs) == pytest.approx(whole - left)


def test_the_layer_that_knows_most_on_other_examples_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TwoSourcesSpec(length=20, examples=30)

    def competed(on_test: str) -> dict[str, float]:
        """Layer a knows the source on the validation split, and `on_test` on the other."""

        def winners(model: Any, spec: TwoSourcesSpec, split: str) -> Any:
            informs = spec.informative(split, np.arange(30))
            knows = "a" if split == "valid" else on_test
            return {name: informs.astype(int) if name == knows else 0 * informs for name in "ab"}, informs

        monkeypatch.setattr(tim, "_winners", winners)
        return tim._competed(arm("tim"), spec, 0)

    found = competed("a")
    assert found["bits"] > 0.9 and found["five times shuffled"] < 0.1 and found["shuffled again"] < 0.02
    assert competed("b")["bits"] == 0


def test_winners_are_of_every_layer_of_mechanisms_and_of_every_pair_that_is_read() -> None:
    layers, informs = tim._winners(arm("tim"), TwoSourcesSpec(length=20, examples=70), "test")
    assert sorted(layers) == [f"decoder.layers.{n}.competition" for n in (2, 3, 4)]
    assert all(won.shape == informs.shape == (70, 20) for won in layers.values())


@pytest.mark.slow
def test_the_claim_runs_and_every_gate_has_its_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    size = tim._Size(steps=3, seeds=2, control_seeds=1, examples=8, data={"length": 8})
    monkeypatch.setitem(tim._SIZES, "quick", size)
    assert tim.TWO_SOURCES.run is not None
    values = tim.TWO_SOURCES.run("quick", 0).values
    for gate in tim.TWO_SOURCES.gates:
        assert isinstance(gate, Effect)
        assert set(values[gate.arm]) == set(values[gate.against]) == {0, 1} and set(gate.needs) <= set(values)
    assert set(values["diagonal"]) == set(values["without competition"]) == {0}
    assert "without competition: bits" not in values and "plain: bits" not in values
    assert all(math.isfinite(value) for by_seed in values.values() for value in by_seed.values())
