"""BitLinear: gradients straight through, slices and groups by themselves, packed equal to unpacked, costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import torchstone
from torchstone.errors import TorchstoneError
from torchstone.model.linear.bitlinear import BitLinearSpec, PackedBitLinear
from torchstone.model.measure import energy, measure
from torchstone.model.site import Site, initialise
from torchstone.ops.experts import group, grouped_product_reference
from torchstone.spec import resolve
from torchstone.train.run import shape_of

FIELDS: dict[str, Any] = {"width": 32, "depth": 2, "vocabulary": 61, "context": 64, "attention": {"heads": 4}}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(spec: BitLinearSpec, bias: bool = False) -> Any:
    made = initialise(Site(width=32, linear_spec=spec).linear(32, (5, 7), ("up", "gate"), bias=bias), 0)
    if bias:
        torch.nn.init.normal_(made.bias, generator=torch.Generator().manual_seed(1))
    return made


def by_hand(spec: BitLinearSpec, m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The quantised operands in floats, (..., I) and (O, I), written out."""
    G, Q = spec.groups, 2 ** (spec.act_bits - 1) - 1
    h = x.unflatten(-1, (G, -1))
    if spec.norm == "layernorm":
        h = h - h.mean(-1, keepdim=True)
    if spec.norm != "none":
        h = h * (h.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    gamma = h.abs().amax(-1, keepdim=True)
    x_q = ((h * Q / gamma).round() * gamma / Q).flatten(-2)
    rows = []
    for part in m.weight.detach().split(m.slices):
        w = part.unflatten(-1, (G, -1))
        beta = w.abs().mean((0, 2), keepdim=True)
        values = torch.where(w >= w.mean((0, 2), keepdim=True), 1.0, -1.0)
        values = values if spec.weights == "binary" else (w / beta).round().clamp(-1, 1)
        rows.append((values * beta).flatten(-2))
    return x_q, torch.cat(rows)


SPECS = [
    BitLinearSpec(weights=weights, norm=norm, groups=groups, act_bits=bits)  # type: ignore[arg-type]
    for weights in ("ternary", "binary")
    for norm, groups, bits in (("rmsnorm", 1, 8), ("layernorm", 4, 8), ("none", 2, 4))
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_go_straight_through_both_quantisers(spec: BitLinearSpec) -> None:
    """The weight's is that of a plain product of the quantised operands; the input's too, then through the norm."""
    m, x, back = linear(spec, bias=True).double(), drawn(2, 3, 32).double().requires_grad_(), drawn(2, 3, 12).double()
    m(x).backward(back)
    x_q, w_q = by_hand(spec, m, x.detach())
    torch.testing.assert_close(m.weight.grad, torch.einsum("bto,bti->oi", back, x_q), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(m.bias.grad, back.sum((0, 1)))
    leaf = x.detach().requires_grad_()
    normed = leaf.unflatten(-1, (spec.groups, -1))
    if spec.norm == "layernorm":
        normed = normed - normed.mean(-1, keepdim=True)
    if spec.norm != "none":
        normed = normed / (normed.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    normed.flatten(-2).backward(back @ w_q)
    assert leaf.grad is not None and x.grad is not None
    torch.testing.assert_close(x.grad, leaf.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_exact_product_is_that_of_the_kinds_two_functions(spec: BitLinearSpec) -> None:
    m, x = linear(spec).double(), drawn(2, 3, 32).double()
    weight = torch.cat([spec.weight(part) for part in m.weight.split(m.slices)])
    torch.testing.assert_close(m(x), F.linear(spec.input(x), weight), rtol=1e-10, atol=1e-12)
    for part, rows in zip(m.weight.split(m.slices), weight.split(m.slices), strict=True):
        sizes = rows.unflatten(-1, (spec.groups, -1)).abs().transpose(0, 1).flatten(1)
        count = [len(group_.unique()) for group_ in sizes]
        assert count == [1] * spec.groups if spec.weights == "binary" else max(count) <= 2
        beta = part.unflatten(-1, (spec.groups, -1)).abs().mean((0, 2))
        torch.testing.assert_close(sizes.amax(1), beta)


def test_a_scale_of_the_input_is_lost_in_the_norm_and_one_of_a_slice_stays_in_that_slice() -> None:
    m, x = linear(BitLinearSpec()), 10 * drawn(2, 3, 32)
    y = m(x)
    torch.testing.assert_close(m(7 * x), y, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        m.weight[:5] *= 3
    torch.testing.assert_close(m(x), torch.cat([3 * y[..., :5], y[..., 5:]], -1))


def test_groups_agree_with_none_where_all_have_the_same_numbers() -> None:
    one, four = (linear(BitLinearSpec(norm="none", groups=groups)) for groups in (1, 4))
    with torch.no_grad():
        for m in (one, four):
            m.weight.copy_(drawn(12, 8).repeat(1, 4))
    x = drawn(2, 3, 8).repeat(1, 1, 4)
    torch.testing.assert_close(one(x), four(x))


@pytest.mark.parametrize("weights", ["ternary", "binary"])
def test_experts_have_a_beta_for_each_slice_of_each(weights: Any) -> None:
    spec = BitLinearSpec(weights=weights, groups=2)
    bank: Any = initialise(Site(width=32, linear_spec=spec).bank(3, 32, (4, 4), ("gate", "up")), 0)
    with torch.no_grad():
        bank.weight.view(3, 8, 32).mul_(torch.tensor([1.0, 5.0, 0.2])[:, None, None])
    x, groups = drawn(7, 32).requires_grad_(), group(torch.tensor([[0], [2], [2], [1], [3], [0], [2]]), 3)
    rows = x[torch.argsort(torch.tensor([0, 2, 2, 1, 3, 0, 2]), stable=True)]
    x_q = spec.input(rows)
    weight = torch.cat([spec.weight(part) for part in bank.weight.split(bank.slices)]).view(3, 8, 32)
    wanted, found = grouped_product_reference(x_q, weight, groups.expert_M), bank(rows, groups)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad(y.sin().sum(), bank.weight, retain_graph=True)[0] for y in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_lora_beside_it_starts_as_the_projection_itself() -> None:
    base = BitLinearSpec()
    plain = linear(base)
    adapted: Any = initialise(
        Site(width=32, linear_spec=resolve("linear", "lora")(base=base)).linear(32, (5, 7), ("up", "gate")), 0
    )
    adapted.weight.data.copy_(plain.weight)
    x = drawn(2, 3, 32)
    torch.testing.assert_close(adapted(x), plain(x))


# ------------------------------------------------------------------------------------------------------------ packed


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_packed_equals_unpacked_to_the_bit(spec: BitLinearSpec) -> None:
    m = linear(spec, bias=True)
    packed = PackedBitLinear(32, (5, 7), True, spec).eval()
    packed.load_state_dict({**packed.of(m.weight), "bias": m.bias})
    for rows in ((1,), (2, 3), (1, 1)):
        x = drawn(*rows, 32, seed=len(rows))
        with torch.no_grad():
            assert torch.equal(packed(x), m(x))
    assert packed.packed.nbytes + packed.beta.nbytes == spec.packed_bytes(32, (5, 7))


def test_what_cannot_be_is_said_in_a_sentence() -> None:
    with pytest.raises(TorchstoneError, match="groups: 3 groups do not divide the 32 inputs of a projection"):
        torchstone.build({**FIELDS, "linear": {"kind": "bitlinear", "groups": 3}})
    with pytest.raises(TorchstoneError, match=r"linear.act_bits: .*4.*8"):
        torchstone.build({**FIELDS, "linear": {"kind": "bitlinear", "act_bits": 5}})
    packed = {"kind": "bitlinear", "packed": True}
    with pytest.raises(TorchstoneError, match="packed weights do not train; train without packed, then export"):
        torchstone.build({**FIELDS, "linear": packed}).train()(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(TorchstoneError, match="matrices of experts have no packed form"):
        torchstone.build({**FIELDS, "linear": packed, "ffn": {"kind": "moe", "experts": 4}})
    absorbed = {"kind": "mla", "heads": 4, "kv_latent": 8, "nope_dim": 4, "rope_dim": 4, "v_dim": 4, "form": "absorbed"}
    with pytest.raises(TorchstoneError, match="absorbed needs projections that are linear, and bitlinear ones are not"):
        torchstone.build({**FIELDS, "attention": absorbed, "linear": "bitlinear"})


def test_norms_before_projections_give_way_to_those_inside() -> None:
    ours, bare = (torchstone.build({**FIELDS, "linear": {"kind": "bitlinear", "norm": n}}) for n in ("rmsnorm", "none"))
    names = {name for name, _ in bare.named_parameters()} - {name for name, _ in ours.named_parameters()}
    assert names == {f"decoder.layers.{i}.{s}_residual.norm.weight" for i in range(2) for s in ("attention", "ffn")}


# ------------------------------------------------------------------------------------------------------------- costs


def test_bytes_and_energy_are_the_closed_forms() -> None:
    D, F_, V, L = 32, 48, 61, 2
    fields = {**FIELDS, "ffn": {"kind": "mlp", "hidden": F_}}
    dense, bit = (shape_of(torchstone.build({**fields, "linear": kind}).spec) for kind in ("dense", "bitlinear"))
    shapes = [(D, 3 * D), (D, D), (D, F_), (F_, D)]
    weights = L * sum(i * o for i, o in shapes)
    rest = V * D + D  # the table and the final norm
    counted = measure(bit, dtype=torch.bfloat16)
    assert counted.weight_bytes == 2 * (weights + rest)
    assert counted.packed_weight_bytes == weights // 4 + 4 * 6 * L + 2 * rest  # six slices a layer have a beta
    assert measure(dense).packed_weight_bytes == measure(dense).weight_bytes == 4 * (weights + rest + 2 * L * D)
    multiplied, added = V * D, V * (D - 1)  # the head is a plain product
    plain, ours = energy(dense), energy(bit, torch.bfloat16)
    assert plain.multiply_45nm == pytest.approx(3.7 * (weights + multiplied))
    assert plain.add_7nm == pytest.approx(0.38 * (L * sum((i - 1) * o for i, o in shapes) + added))
    assert ours.multiply_7nm == pytest.approx(0.34 * (L * sum(i + o for i, o in shapes) + multiplied))
    assert ours.add_45nm == pytest.approx(0.03 * L * sum((i - 1) * o for i, o in shapes) + 0.4 * added)


def test_energy_counts_the_experts_that_a_token_takes() -> None:
    moe = {"kind": "moe", "experts": 8, "active": 2, "hidden": 16, "shared": 0, "router": "hash", "gated": False}
    model = shape_of(torchstone.build({**FIELDS, "ffn": moe}).spec)
    weights = 2 * (4 * 32 * 32 + 2 * 2 * 32 * 16) + 61 * 32
    assert energy(model).multiply_7nm == pytest.approx(1.31 * weights)
