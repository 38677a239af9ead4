"""AdamW, Muon and SGD move parameters as their papers say, and each parameter by the rule of its group."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.transformer import TransformerSpec
from torchstone.spec import kinds, validate
from torchstone.train.optimizers import NamedParameter, named_parameters, set_factor
from torchstone.train.optimizers.adamw import AdamWSpec
from torchstone.train.optimizers.muon import MuonSpec, orthogonal
from torchstone.train.optimizers.sgd import SGDSpec
from torchstone.train.run import build_model

MODEL: dict[str, Any] = {
    "width": 16,
    "depth": 2,
    "vocabulary": 11,
    "context": 8,
    "attention": {"heads": 4, "kv_heads": 2, "bias": "all"},
    "norm": "layernorm",
    "position": "learned",
    "head": {"tied": False, "bias": True},
}


def named_of(**fields: Any) -> tuple[torch.nn.Module, dict[str, NamedParameter]]:
    model = build_model(validate(TransformerSpec, {**MODEL, **fields}), 0)
    return model, {p.name: p for p in named_parameters([("", model)])}


def give_gradients(named: dict[str, NamedParameter], seed: int) -> dict[str, torch.Tensor]:
    for name, p in named.items():
        p.value.grad = torch.randn(p.value.shape, generator=Key(seed).fold(name).generator())
    return {name: p.value.grad.clone() for name, p in named.items()}  # type: ignore[union-attr]


def test_every_parameter_is_named_once_and_a_tied_matrix_counts_once() -> None:
    model, named = named_of(head={"tied": True})
    assert set(named) == {name for name, _ in model.named_parameters()}
    assert len({id(p.value) for p in named.values()}) == len(named)


@pytest.mark.parametrize("spec", [kind(lr=0.1, layer_decay=0.5) for kind in (AdamWSpec, MuonSpec, SGDSpec)])
def test_layers_below_the_top_have_smaller_rates(spec: Any) -> None:
    model, _ = named_of()
    named = {p.name: p for p in named_parameters([("", model)], spec.layer_decay)}
    wanted = {"embedding": 1 / 8, "decoder.positions": 1 / 8, "decoder.layers.0": 1 / 4, "decoder.layers.1": 1 / 2}
    for name, p in named.items():
        assert p.rate == next((rate for start, rate in wanted.items() if name.startswith(start)), 1.0), name
    peaks = {id(p): group["peak"] for group in spec.build(list(named.values())).param_groups for p in group["params"]}
    assert all(peaks[id(p.value)] == pytest.approx(0.1 * p.rate) for p in named.values())
    assert {p.rate for p in named_parameters([("", model)])} == {1.0}


def test_names_carry_no_prefix_of_a_wrapper() -> None:
    model, named = named_of()
    assert set(named) == {p.name for p in named_parameters([("", torch.compile(model))])}


def test_frozen_parameters_are_left_out() -> None:
    model, _ = named_of()
    model.embedding.weight.requires_grad_(False)  # type: ignore[union-attr]
    assert "embedding.weight" not in {p.name for p in named_parameters([("", model)])}


@pytest.mark.parametrize("spec", [AdamWSpec(), MuonSpec(), SGDSpec()], ids=lambda spec: spec.kind)
def test_norms_and_biases_do_not_decay_and_matrices_do(spec: Any) -> None:
    _, named = named_of()
    optimizer = spec.build(list(named.values()))
    decay = {id(value): group["weight_decay"] for group in optimizer.param_groups for value in group["params"]}
    for name, p in named.items():
        is_vector = name.endswith("bias") or "norm" in name
        assert decay[id(p.value)] == (0.0 if is_vector else spec.weight_decay), name
    assert len(decay) == len(named)


def test_muon_moves_hidden_matrices_and_adamw_the_rest() -> None:
    _, named = named_of()
    hidden = {name for name, p in named.items() if p.hidden}
    assert hidden == {
        f"decoder.layers.{i}.{part}.weight"
        for i in range(2)
        for part in ("attention.qkv", "attention.out", "ffn.gate_up", "ffn.down")
    }
    qkv = named["decoder.layers.0.attention.qkv.weight"]
    assert qkv.slices == (16, 8, 8)
    assert named["decoder.layers.0.ffn.gate_up.weight"].slices == (64, 64)


def plain_orthogonal(g: torch.Tensor, iterations: int) -> torch.Tensor:
    """The quintic on the singular values themselves."""
    u, s, vt = torch.linalg.svd(g.double(), full_matrices=False)
    s = s / (g.double().norm() + 1e-7)
    for _ in range(iterations):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (1, 7), (7, 1)], ids=str)
def test_newton_schulz_acts_on_singular_values_alone(shape: tuple[int, int]) -> None:
    g = torch.randn(shape)
    found = orthogonal(g, 5)
    torch.testing.assert_close(found.double(), plain_orthogonal(g, 5), rtol=1e-3, atol=1e-4)
    singular = torch.linalg.svdvals(found)
    # 0.7 to 1.2, where the smallest singular value is not tiny
    assert singular.max() < 1.25 and singular.min() > 0.3


def test_products_in_bf16_stay_near_the_orthogonal_matrix() -> None:
    g = torch.randn(24, 40)
    exact = orthogonal(g)
    with torch.autocast("cpu", torch.bfloat16):
        rough = orthogonal(g)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() < 0.05 * exact.norm()


class PlainMuon:
    """Muon and AdamW written from their papers, in float64, one parameter at a time."""

    def __init__(self, spec: MuonSpec | AdamWSpec) -> None:
        self.spec, self.state, self.steps = spec, {}, 0  # type: ignore[var-annotated]

    def step(self, named: dict[str, NamedParameter], values: dict[str, torch.Tensor], grads: dict[str, torch.Tensor],
             lr: float) -> None:  # fmt: skip
        self.steps += 1
        for name, p in named.items():
            w, g = values[name], grads[name].double()
            vector = name.endswith("bias") or "norm" in name
            w *= 1 - lr * (0.0 if vector else self.spec.weight_decay)
            if isinstance(self.spec, MuonSpec) and p.hidden:
                m = self.state.setdefault(name, torch.zeros_like(w))
                m.mul_(self.spec.momentum).add_(g, alpha=1 - self.spec.momentum)
                update = (1 - self.spec.momentum) * g + self.spec.momentum * m if self.spec.nesterov else m
                row = 0
                for size in p.slices:
                    part = update[row : row + size]
                    scale = 0.2 * max(size, w.shape[1]) ** 0.5
                    w[row : row + size] -= lr * scale * plain_orthogonal(part, self.spec.iterations)
                    row += size
            else:
                b1, b2 = self.spec.betas
                m, v = self.state.setdefault(name, (torch.zeros_like(w), torch.zeros_like(w)))
                m.mul_(b1).add_(g, alpha=1 - b1)
                v.mul_(b2).add_(g * g, alpha=1 - b2)
                w -= lr * (m / (1 - b1**self.steps)) / ((v / (1 - b2**self.steps)).sqrt() + self.spec.eps)


@pytest.mark.parametrize(
    "spec",
    [AdamWSpec(lr=0.01, weight_decay=0.3), MuonSpec(lr=0.01), MuonSpec(lr=0.02, nesterov=False, iterations=3)],
    ids=["adamw", "muon", "muon-plain"],
)
def test_steps_equal_a_plain_implementation(spec: Any) -> None:
    _, named = named_of()
    optimizer, plain = spec.build(list(named.values())), PlainMuon(spec)
    values = {name: p.value.detach().double().clone() for name, p in named.items()}
    for step in range(4):
        factor = (step + 1) / 4
        set_factor(optimizer, factor)
        grads = give_gradients(named, step)
        optimizer.step()
        plain.step(named, values, grads, spec.lr * factor)
    for name, p in named.items():
        torch.testing.assert_close(
            p.value.detach().double(), values[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize(
    "spec",
    [
        SGDSpec(lr=0.1, weight_decay=0.05),
        SGDSpec(lr=0.1, weight_decay=0.05, nesterov=True),
        SGDSpec(lr=0.1, weight_decay=0.05, momentum=0),
    ],
    ids=["momentum", "nesterov", "plain"],
)
def test_sgd_is_torchs_and_its_decay_goes_through_the_momentum(spec: SGDSpec) -> None:
    """Step by step the same bits as `torch.optim.SGD` of each parameter alone, and near the formula in float64."""
    _, named = named_of()
    optimizer = spec.build(list(named.values()))
    alone, values, momenta = {}, {}, {}
    for name, p in named.items():
        decay = spec.weight_decay if p.value.dim() >= 2 else 0.0
        twin = torch.nn.Parameter(p.value.detach().clone())
        fields: dict[str, Any] = {"lr": spec.lr, "momentum": spec.momentum, "nesterov": spec.nesterov}
        alone[name] = torch.optim.SGD([twin], weight_decay=decay, **fields), twin
        values[name], momenta[name] = twin.detach().double(), torch.zeros_like(twin, dtype=torch.float64)
    for step in range(5):
        set_factor(optimizer, factor := 1 / (step + 1))
        for name, gradient in give_gradients(named, step).items():
            torchs, twin = alone[name]
            torchs.param_groups[0]["lr"], twin.grad = spec.lr * factor, gradient
            torchs.step()
            g = gradient.double() + (spec.weight_decay if twin.dim() >= 2 else 0.0) * values[name]
            momenta[name] = spec.momentum * momenta[name] + g
            values[name] -= spec.lr * factor * (g + spec.momentum * momenta[name] if spec.nesterov else momenta[name])
        optimizer.step()
        for name, p in named.items():
            assert torch.equal(p.value, alone[name][1]), (step, name)
            torch.testing.assert_close(p.value.detach().double(), values[name], rtol=1e-5, atol=1e-5)


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(TorchstoneError, match="looks ahead along the momentum, which is 0"):
        validate(SGDSpec, {"nesterov": True, "momentum": 0})


def test_muon_orthogonalises_the_slices_of_a_fused_projection_separately() -> None:
    _, named = named_of()
    name = "decoder.layers.0.attention.qkv.weight"
    p = named[name]
    optimizer = MuonSpec(lr=1.0, weight_decay=0.0).build([p])
    before = p.value.detach().clone()
    give_gradients({name: p}, 0)
    assert p.value.grad is not None
    p.value.grad[:16] *= 1000.0  # queries' size must not drown keys and values
    optimizer.step()
    for part, size in zip((before - p.value.detach()).split(p.slices), p.slices, strict=True):
        singular = torch.linalg.svdvals(part / (0.2 * max(size, 16) ** 0.5))
        assert singular.max() < 1.3 and singular.mean() > 0.6


def test_every_optimizer_kind_trains_and_has_state_that_can_be_saved() -> None:
    for kind in kinds("optimizer"):
        _, named = named_of()
        from torchstone.spec import resolve

        optimizer = resolve("optimizer", kind)().build(list(named.values()))
        give_gradients(named, 0)
        optimizer.step()
        for p in named.values():
            assert p.value in optimizer.state
            assert all(isinstance(value, torch.Tensor) for value in optimizer.state[p.value].values())
