"""Dilated attention on the kept tokens equals its definition over all pairs, forwards and backwards; and its cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distributed import run_ranks
from torchstone.errors import TorchstoneError
from torchstone.ops.attention import attention_reference
from torchstone.ops.dilated import (
    Marks,
    Pattern,
    Shards,
    dilated,
    dilated_reference,
    dilated_sparse,
    layout,
    plan,
    sparse,
)
from torchstone.train.mesh import Mesh

B, H, G, K = 2, 4, 2, 8
SCHEDULES = [((64,), (1,)), ((4, 8, 16), (1, 2, 4)), ((4, 9, 64), (1, 2, 5)), ((3, 3), (1, 1)), ((5,), (1,))]


def patterns(lengths: tuple[int, ...], rates: tuple[int, ...], heads: int = H) -> tuple[Pattern, ...]:
    return tuple(Pattern(w, r, tuple(head % r for head in range(heads))) for w, r in zip(lengths, rates, strict=True))


def operands(T: int, B: int = B, H: int = H, G: int = G) -> list[torch.Tensor]:
    return [torch.randn(B, heads, T, K, dtype=torch.float64, requires_grad=True) for heads in (H, G, G)]


def marks(T: int, kind: str = "plain") -> Marks:
    """Marks of rows that are one document, of packed documents, or of tokens with padding among them."""
    index = torch.arange(T)[None]
    document, place, valid = torch.zeros_like(index), index, None
    if kind == "documents":
        document = torch.zeros(B, T, dtype=torch.int64)
        for row in document:
            for start in sorted(torch.randint(T, (3,)).tolist()):
                row[start:] = start
        place = index - document
    if kind == "padding":
        valid = torch.rand(B, T) < 0.8
        place = (valid.long().cumsum(1) - 1).clamp(min=0)
    return Marks(index, document, place, valid)


def distance(row: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """A score bias by distance, with a slope of each head's own."""
    return -0.1 * (head[:, None, None] + 1) * (q[:, :, None] - k[:, None, :]).abs().double()


def agree(T: int, kind: str, mix_gradient: bool, causal: bool, biased: bool, schedule: Any) -> None:
    made, mark = operands(T), marks(T, kind)
    planned = plan(mark, mark, patterns(*schedule), causal=causal, aligned=kind == "plain", flags=not biased)
    weight = torch.randn(B, H, T, K, dtype=torch.float64)
    all_pairs = torch.arange(B).repeat_interleave(H), torch.arange(H).repeat(B)
    columns = torch.arange(T).expand(B * H, -1)
    bias = distance(*all_pairs, columns, columns).unflatten(0, (B, H)) if biased else None
    more: dict[str, Any] = {"scale": 0.5, "mix_gradient": mix_gradient}
    ours = dilated_sparse(*made, planned, bias=distance if biased else None, **more)
    wanted = dilated_reference(*made, planned, bias_BHTS=bias, **more)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-11)
    gradients = (torch.autograd.grad((y * weight).sum(), made) for y in (ours, wanted))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["plain", "documents", "padding"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_kept_tokens_alone_equal_the_definition_over_all_pairs(schedule: Any, causal: bool, kind: str) -> None:
    for T, mix_gradient, biased in ((37, True, False), (64, False, False), (12, True, True), (2, False, True)):
        agree(T, kind, mix_gradient, causal, biased, schedule)


@pytest.mark.parametrize("kind", ["plain", "documents"])
def test_small_blocks_and_few_masks_at_once_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_BLOCK", 3)
    monkeypatch.setattr(layout, "_LARGEST", 2)
    monkeypatch.setattr(sparse, "_CELLS", 40)
    for causal, biased in ((True, False), (True, True), (False, False), (False, True)):
        agree(19, kind, True, causal, biased, ((4, 9, 64), (1, 2, 5)))


def test_the_definition_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    made, mark = operands(20), marks(20, "documents")
    planned = plan(mark, mark, patterns((4, 8), (1, 2)), causal=True, flags=False)
    fast = dilated(*made, planned, scale=0.5, bias=distance)
    monkeypatch.setenv("TORCHSTONE_OPS", "reference")
    slow = dilated(*made, planned, scale=0.5, bias=distance)
    torch.testing.assert_close(fast, slow)


# ------------------------------------------------------------------------------------------------- identities


def run(made: list[torch.Tensor], lengths: Any, rates: Any, causal: bool = True, **more: Any) -> torch.Tensor:
    mark = marks(made[0].shape[2])
    planned = plan(mark, mark, patterns(lengths, rates, made[0].shape[1]), causal=causal, aligned=True)
    return dilated(*made, planned, scale=0.5, **more)


def same_gradient(a: torch.Tensor, b: torch.Tensor, made: list[torch.Tensor]) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    weight = torch.randn_like(a)
    for x, y in zip(*(torch.autograd.grad((z * weight).sum(), made, retain_graph=True) for z in (a, b)), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("causal", [True, False])
def test_one_pattern_as_long_as_the_sequence_is_full_attention(causal: bool) -> None:
    made = operands(21)
    for length in (21, 1000):
        full = attention_reference(*made, scale=0.5, causal=causal)[0]
        same_gradient(run(made, (length,), (1,), causal), full, made)


@pytest.mark.parametrize("mix_gradient", [True, False])
def test_a_pattern_listed_twice_is_the_pattern(mix_gradient: bool) -> None:
    made = operands(21)
    twice = run(made, (8, 8), (1, 1), mix_gradient=mix_gradient)
    same_gradient(twice, run(made, (8,), (1,)), made)


def test_two_patterns_are_attention_over_the_keys_of_both() -> None:
    # never quite disjoint: a query that two patterns keep is itself a key of both
    T, made = 12, operands(12)
    mark = marks(T)
    # of segments of 4, and of every other token of the sequence: heads 0 and 2 keep even ones, 1 and 3 odd ones
    planned = plan(mark, mark, patterns((4, 12), (1, 2)), causal=False, aligned=True)
    mixed = dilated(*made, planned, scale=0.5, mix_gradient=True)
    for t in (5, 10):
        for h in range(H):
            own = [s for s in range(T) if s // 4 == t // 4]
            far = [s for s in range(T) if t % 2 == h % 2 == s % 2]
            keys = own + far  # a key of both counts twice
            q, k, v = made[0][:, h : h + 1, t : t + 1], *(x[:, h // 2][:, None, keys] for x in made[1:])
            union = attention_reference(q, k, v, scale=0.5)[0]
            same_gradient(mixed[:, h, t], union[:, 0, 0], made)


def test_segments_are_islands_where_there_is_one_pattern_and_no_token_sees_a_later_one() -> None:
    made = operands(24)
    for causal in (True, False):
        y = run(made, (8,), (1,), causal)
        (grad,) = torch.autograd.grad(y[:, :, 13].sum(), made[2], retain_graph=True)
        reached = grad.abs().amax((0, 1, 3)).nonzero().flatten().tolist()
        assert reached == list(range(8, 14 if causal else 16))


def test_shares_of_every_token_add_up_to_one() -> None:
    q, k, v = operands(40)
    ones = torch.ones_like(v)
    for schedule in SCHEDULES:
        torch.testing.assert_close(run([q, k, ones], *schedule), torch.ones_like(q))


# -------------------------------------------------------------------------------------------------------- cost


class Products(TorchDispatchMode):
    """Counts multiply-adds of scores and of mixed values, as kernels are called."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.largest = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            (Z, heads, c, K), W = arguments[0].shape, arguments[1].shape[2]
            self.total += 2 * Z * heads * c * W * K
        out = function(*arguments, **(named or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("schedule", [((16, 32, 64), (1, 2, 4)), ((16, 64), (1, 4)), ((8,), (1,))], ids=str)
def test_multiply_adds_are_those_of_the_paper(schedule: Any, causal: bool) -> None:
    for N in (64, 256):
        with torch.no_grad(), Products() as counted:
            run(operands(N, B=1), *schedule, causal)
        d = H * K
        assert counted.total == 2 * N * d * sum(w / r**2 for w, r in zip(*schedule, strict=True))


@pytest.mark.parametrize("kind", ["plain", "documents"])
def test_no_tensor_grows_faster_than_the_sequence(kind: str) -> None:
    largest = []
    for N in (512, 2048):
        made = [x.detach().requires_grad_() for x in operands(N)]
        mark = marks(N, kind)
        with Products() as counted:
            planned = plan(mark, mark, patterns((8, 16, 32), (1, 2, 4)), causal=True, aligned=kind == "plain")
            dilated(*made, planned, scale=0.5, mix_gradient=True).sum().backward()
        largest.append(counted.largest)
    assert largest[1] <= 4.1 * largest[0]


# -------------------------------------------------------------------------------------- a sequence over two ranks


def _sharded(mesh: Mesh, made: list[torch.Tensor], schedule: Any, causal: bool) -> list[torch.Tensor]:
    """Output and gradients of this rank's part of the sequence."""
    part = [x.detach().chunk(2, 2)[mesh.rank].clone().requires_grad_() for x in made]
    T = part[0].shape[2]
    index = torch.arange(T)[None] + mesh.rank * T
    mark = Marks(index, torch.zeros_like(index), index)
    planned = Shards().plan(mark, patterns(*schedule), causal=causal)
    y = dilated(*part, planned, scale=0.5, mix_gradient=True)
    weight = _weight(made[0]).chunk(2, 2)[mesh.rank]
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), part)]


def _weight(q: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, q.numel(), dtype=q.dtype).view_as(q)


def _both(mesh: Mesh, made: list[torch.Tensor], schedules: list[Any]) -> list[list[torch.Tensor]]:
    return [_sharded(mesh, made, schedule, causal) for schedule in schedules for causal in (True, False)]


@pytest.mark.slow
def test_two_ranks_equal_one_forwards_and_backwards() -> None:
    # within a rank, over both, longer than both; 5 does not divide a rank's 12, so that the second begins off the grid
    made, schedules = operands(24), [((4, 24), (1, 2)), ((12, 24, 100), (1, 3, 5)), ((6, 12), (1, 2))]
    first, second = run_ranks(_both, 2, [x.detach() for x in made], schedules)
    cases = [(schedule, causal) for schedule in schedules for causal in (True, False)]
    for (schedule, causal), a, b in zip(cases, first, second, strict=True):
        y = run(made, *schedule, causal, mix_gradient=True)
        whole = [y, *torch.autograd.grad((y * _weight(made[0])).sum(), made)]
        for ours, wanted in zip(map(lambda *parts: torch.cat(parts, 2), a, b), whole, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-11)


def _refused(mesh: Mesh) -> str:
    index = torch.arange(12)[None] + 12 * mesh.rank
    with pytest.raises(TorchstoneError) as caught:
        Shards().plan(Marks(index, index * 0, index), patterns((5, 12), (1, 2)), causal=True)
    return str(caught.value)


@pytest.mark.slow
def test_segments_that_straddle_ranks_are_refused() -> None:
    sentences = run_ranks(_refused)
    assert sentences[0].startswith("attention.segments: 5 tokens, and each of 2 ranks holds 12; a segment must divide")
