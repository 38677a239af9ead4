"""Cross-entropy in chunks equals its definition, forwards and in every gradient, and never holds all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from torchstone.ops.cross_entropy import linear_cross_entropy, linear_nll, linear_nll_reference

N, D, V = 63, 37, 101
FORMS = [
    pytest.param(bias, softcap, weights, id="-".join(n for n, on in zip(
        ("bias", "softcap", "weights"), (bias, softcap, weights), strict=True) if on) or "plain")
    for bias in (False, True) for softcap in (None, 3.0) for weights in (False, True)
]  # fmt: skip


def operands(bias: bool, weights: bool, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    made: dict[str, Any] = {
        "h": torch.randn(N, D, dtype=dtype, requires_grad=True),
        "weight": (0.4 * torch.randn(V, D, dtype=dtype)).requires_grad_(),
        "targets": torch.randint(0, V, (N,)),
        "weights": torch.rand(N, dtype=dtype) if weights else None,
        "bias": torch.randn(V, dtype=dtype, requires_grad=True) if bias else None,
    }
    made["targets"][::5] = -1
    return made


def leaves(made: dict[str, Any]) -> list[torch.Tensor]:
    return [made[name] for name in ("h", "weight", "bias") if made[name] is not None]


def torchs_own(made: dict[str, Any], softcap: float | None) -> torch.Tensor:
    logits = F.linear(made["h"], made["weight"], made["bias"])
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    nll = F.cross_entropy(logits, made["targets"], ignore_index=-1, reduction="none")
    return (nll if made["weights"] is None else nll * made["weights"]).sum()


@pytest.mark.parametrize("chunk", [None, 1, 16, 62, 64])
@pytest.mark.parametrize(("bias", "softcap", "weights"), FORMS)
def test_chunks_equal_the_definition_forwards_and_in_every_gradient(
    bias: bool, softcap: float | None, weights: bool, chunk: int | None
) -> None:
    made = operands(bias, weights)
    loss = linear_cross_entropy(
        made["h"], made["weight"], made["targets"], made["weights"], bias_V=made["bias"], softcap=softcap, chunk=chunk
    )
    ours = torch.autograd.grad(1.7 * loss, leaves(made))
    nll = linear_nll_reference(made["h"], made["weight"], made["targets"], bias_V=made["bias"], softcap=softcap)
    defined = (nll if made["weights"] is None else nll * made["weights"]).sum()
    independent = torchs_own(made, softcap)
    for other in (defined, independent):
        torch.testing.assert_close(loss, other, rtol=1e-10, atol=1e-10)
        for a, b in zip(ours, torch.autograd.grad(1.7 * other, leaves(made)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("bias", "softcap", "weights"), FORMS)
def test_loss_per_row_equals_the_definition(bias: bool, softcap: float | None, weights: bool) -> None:
    made = operands(bias, weights)
    arguments = {"bias_V": made["bias"], "softcap": softcap}
    ours = linear_nll(made["h"], made["weight"], made["targets"], chunk=16, **arguments)
    assert not ours.requires_grad
    reference = linear_nll_reference(made["h"], made["weight"], made["targets"], **arguments)
    torch.testing.assert_close(ours, reference.detach(), rtol=1e-10, atol=1e-10)


def test_gradient_by_finite_differences() -> None:
    h, weight, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (7, 3), (7,)))
    targets, weights = torch.tensor([0, 6, -1, 3, 2]), torch.rand(5, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, targets, weights, bias_V=b, softcap=2.0, chunk=2), (h, weight, bias)
    )


def test_masked_rows_change_nothing_whatever_they_hold() -> None:
    made = operands(True, True)
    results = []
    for junk in (0.0, float("nan"), float("inf"), 1e300):
        h = made["h"].detach().clone()
        h[::5] = junk
        weights = made["weights"].clone()
        weights[::5] = junk
        h.requires_grad_()
        parts = [h, made["weight"], made["bias"]]
        loss = linear_cross_entropy(h, made["weight"], made["targets"], weights, bias_V=made["bias"], chunk=16)
        results.append([loss, *torch.autograd.grad(loss, parts), linear_nll(h, made["weight"], made["targets"])])
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            assert torch.equal(a, b)
    assert results[0][1][::5].eq(0).all()


def test_masked_rows_change_nothing_in_the_reference_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHSTONE_OPS", "reference")
    made = operands(False, True)
    h = made["h"].detach().clone()
    h[::5] = float("nan")
    h.requires_grad_()
    loss = linear_cross_entropy(h, made["weight"], made["targets"], made["weights"])
    (grad,) = torch.autograd.grad(loss, h)
    assert torch.isfinite(loss) and torch.isfinite(grad).all()


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_all_logits_never_exist() -> None:
    rows, vocabulary, width, chunk = 1024, 997, 8, 32
    h, weight = torch.randn(rows, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(0, vocabulary, (rows,))
    with Largest() as largest:
        linear_cross_entropy(h, weight, targets, chunk=chunk).backward()
        linear_nll(h, weight, targets, chunk=chunk)
    assert largest.elements == chunk * vocabulary


def test_usual_chunk_is_bounded_whatever_the_vocabulary() -> None:
    from torchstone.ops.cross_entropy import chunked

    for vocabulary in (61, 32_000, 250_000):
        for device in ("cpu", "cuda"):
            most = max(chunked.logits_at_once(device), 16 * vocabulary)
            assert chunked._rows(None, vocabulary, torch.device(device)) * vocabulary <= most


def test_bfloat16_products_are_summed_in_float32() -> None:
    made = operands(True, False, torch.float32)
    exact = linear_cross_entropy(made["h"], made["weight"], made["targets"], bias_V=made["bias"])
    low = [made[name].detach().bfloat16().requires_grad_() for name in ("h", "weight", "bias")]
    loss = linear_cross_entropy(low[0], low[1], made["targets"], bias_V=low[2], chunk=16)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)
    assert all(grad.dtype == torch.bfloat16 and torch.isfinite(grad).all() for grad in torch.autograd.grad(loss, low))
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear_cross_entropy(made["h"], made["weight"], made["targets"], bias_V=made["bias"], chunk=16)
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, exact, rtol=2e-2, atol=0)
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(cast, leaves(made)))


def test_no_rows_and_no_targets_give_zero() -> None:
    h, weight = torch.randn(4, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    loss = linear_cross_entropy(h, weight, torch.full((4,), -100))
    assert loss.item() == 0 and torch.autograd.grad(loss, weight)[0].eq(0).all()
    assert linear_cross_entropy(h[:0], weight, torch.zeros(0, dtype=torch.int64)).item() == 0


def test_evaluation_of_no_rows_gives_no_losses() -> None:
    assert linear_nll(torch.randn(0, D), torch.randn(V, D), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_forced_reference_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made = operands(True, True)
    arguments = (made["h"], made["weight"], made["targets"], made["weights"])
    fast = linear_cross_entropy(*arguments, bias_V=made["bias"], softcap=3.0)
    monkeypatch.setenv("TORCHSTONE_OPS", "reference")
    torch.testing.assert_close(linear_cross_entropy(*arguments, bias_V=made["bias"], softcap=3.0), fast)
