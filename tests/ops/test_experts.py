"""Products over experts equal a loop over experts, forwards and backwards, whoever is chosen; compiled they stay one
graph; few rows touch only the matrices that they chose."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchstone.ops.experts import (
    collect,
    experts_reference,
    gathered_product,
    group,
    grouped,
    grouped_product,
    grouped_product_reference,
    sorted_product,
    spread,
)

E, K, D, H, C = 5, 2, 6, 7, 3

CHOICES: dict[str, torch.Tensor] = {
    "mixed": torch.tensor([[0, 3], [3, 1], [1, 0], [3, 0], [4, 3], [0, 1], [3, 4]]),  # nobody asks 2
    "one_for_all": torch.tensor([[3, 3]] * 7),
    "first_and_last": torch.tensor([[0, 4]] * 7),
    "some_have_none": torch.tensor([[5, 3], [5, 5], [1, 5], [3, 0], [5, 5], [0, 1], [3, 5]]),
    "nobody": torch.full((7, K), E),
    "one_token": torch.tensor([[3, 1]]),
    "two_tokens": torch.tensor([[3, 1], [5, 3]]),
    "no_token": torch.empty(0, K, dtype=torch.int64),
}


def operands(tokens: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """x, gates and two banks of matrices."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, D), (tokens, K), (E, H, D), (E, C, H))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def ours(experts_NK: torch.Tensor, x: torch.Tensor, gates: torch.Tensor, *banks: torch.Tensor) -> torch.Tensor:
    groups = group(experts_NK, E)
    h = torch.tanh(grouped_product(spread(x, groups), banks[0], groups))
    return collect(grouped_product(h, banks[1], groups), gates, groups)


def naive(experts_NK: torch.Tensor, x: torch.Tensor, gates: torch.Tensor, *banks: torch.Tensor) -> torch.Tensor:
    rows = []
    for n in range(len(x)):
        y = torch.zeros(C, dtype=x.dtype)
        for k in range(K):
            if (e := int(experts_NK[n, k])) < E:
                y = y + gates[n, k] * (banks[1][e] @ torch.tanh(banks[0][e] @ x[n]))
        rows.append(y)
    return torch.stack(rows) if rows else x.new_zeros(0, C)


def results(function: Any, experts_NK: torch.Tensor, made: list[torch.Tensor]) -> list[torch.Tensor]:
    y = function(experts_NK, *made)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    loss = (y * weight).sum() + sum((0 * x).sum() for x in made)
    return [y.detach(), *torch.autograd.grad(loss, made)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", CHOICES)
def test_equals_a_loop_over_tokens_and_its_gradient(name: str, dtype: torch.dtype, tolerance: float) -> None:
    choice = CHOICES[name]
    made = operands(len(choice), dtype)
    for mine, wanted in zip(results(ours, choice, made), results(naive, choice, made), strict=True):
        assert mine.shape == wanted.shape
        torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CHOICES)
def test_definition_of_a_layer_is_that_loop_too(name: str) -> None:
    made = operands(len(CHOICES[name]))
    networks = [lambda x, e=e: torch.tanh(x @ made[2][e].T) @ made[3][e].T for e in range(E)]
    wanted = naive(CHOICES[name], *made)
    torch.testing.assert_close(experts_reference(made[0], CHOICES[name], made[1], networks), wanted)


@pytest.mark.parametrize("name", CHOICES)
def test_every_path_is_the_same_product(name: str) -> None:
    groups = group(CHOICES[name], E)
    x_MD, bank = spread(operands(len(CHOICES[name]))[0], groups), operands(1)[2]
    wanted = grouped_product_reference(x_MD, bank, groups.expert_M)
    for found in (
        sorted_product(x_MD, bank, groups.ends_E),
        gathered_product(x_MD, bank, groups.expert_M),
        grouped_product(x_MD, bank, groups),
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_gradients_of_gradients_are_right() -> None:
    groups = group(CHOICES["some_have_none"], E)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(14, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(E, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: sorted_product(*a, groups.ends_E), (x, w))
    assert torch.autograd.gradgradcheck(lambda *a: sorted_product(*a, groups.ends_E), (x, w))
    token = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    gates = torch.randn(7, K, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda t, g: collect(spread(t, groups), g, groups), (token, gates))


def test_rows_are_sorted_by_expert_and_then_by_token() -> None:
    groups = group(CHOICES["some_have_none"], E)
    pairs = list(zip(groups.expert_M.tolist(), groups.order_M.tolist(), strict=True))
    assert pairs == sorted(pairs)
    assert groups.ends_E.tolist() == [2, 4, 4, 7, 7] and groups.ends_E.dtype == torch.int32
    assert torch.equal(groups.order_M[groups.place_M], torch.arange(14))


def test_the_operator_keeps_what_torch_asks_of_one() -> None:
    groups, made = group(CHOICES["mixed"], E), operands(7)
    arguments = spread(made[0], groups).detach().requires_grad_(), made[2], groups.ends_E
    torch.library.opcheck(sorted_product, arguments)


@pytest.mark.parametrize("name", ["mixed", "some_have_none", "one_token"])
def test_compiled_it_is_one_graph_with_the_same_values_and_gradients(name: str) -> None:
    torch._dynamo.reset()
    choice = CHOICES[name]
    made = operands(len(choice))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for mine, wanted in zip(results(compiled, choice, made), results(ours, choice, made), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_under_autocast_it_is_taken_in_bfloat16(compile: bool) -> None:
    torch._dynamo.reset()
    made = operands(7, torch.float32)
    function = torch.compile(ours, fullgraph=True, backend="aot_eager") if compile else ours
    with torch.autocast("cpu", torch.bfloat16):
        y = function(CHOICES["mixed"], *made)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), naive(CHOICES["mixed"], *made), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in made)


@pytest.mark.parametrize("path", ["usual", "gathered"])
def test_few_rows_touch_only_the_matrices_that_they_chose(path: str) -> None:
    bank = torch.full((50, 8, 8), torch.nan)
    bank[[7, 31]] = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    groups, x_MD = group(torch.tensor([[31, 7]]), 50), torch.ones(2, 8)
    if path == "usual":
        y = grouped_product(x_MD, bank, groups)
    else:
        y = gathered_product(x_MD, bank, groups.expert_M)
    torch.testing.assert_close(y, bank[[7, 31]].sum(-1))


def test_the_definition_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, made = group(CHOICES["mixed"], E), operands(7, torch.float32)
    monkeypatch.setenv("TORCHSTONE_OPS", "reference")
    x_MD = spread(made[0], groups)
    assert torch.equal(
        grouped_product(x_MD, made[2], groups), grouped_product_reference(x_MD, made[2], groups.expert_M)
    )


@pytest.mark.parametrize("name", ["mixed", "some_have_none", "one_for_all"])
def test_torchs_kernel_of_groups_means_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where it is not used, in the types and layouts in which a CUDA device takes it."""
    groups = group(CHOICES[name], E)
    generator = torch.Generator().manual_seed(2)
    x, bank = (torch.randn(s, generator=generator).bfloat16().requires_grad_() for s in ((14, 16), (E, 8, 16)))
    wanted = results(lambda _, *a: sorted_product(*a, groups.ends_E), None, [x, bank])  # type: ignore[arg-type]
    calls = []
    monkeypatch.setattr(grouped, "_by_grouped_mm", lambda *a: calls.append(a) or True)
    found = results(lambda _, *a: sorted_product(*a, groups.ends_E), None, [x, bank])  # type: ignore[arg-type]
    assert len(calls) == 3
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=0.02, atol=0.02)
