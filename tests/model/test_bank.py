"""The bank: what is looked up is what brute force finds, in a memory that is bounded, ordered and each row's own."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchstone.errors import TorchstoneError
from torchstone.model import bank as module
from torchstone.model.bank import Bank
from torchstone.train.checkpoint import load_tensors, save_tensors

G, H, K = 2, 4, 6


def filled(*lengths: int, tokens: int = 40, rows: int = 2, seed: int = 0) -> tuple[Bank, list[torch.Tensor]]:
    """A bank after segments of these lengths, and all their keys and values (B, G, T, K)."""
    drawn, bank = torch.Generator().manual_seed(seed), Bank(rows, G, K, tokens=tokens, dtype=torch.float64)
    seen: list[list[torch.Tensor]] = [[], []]
    for length in lengths:
        k, v = (torch.randn(rows, G, length, K, generator=drawn, dtype=torch.float64) for _ in range(2))
        bank.hold(k, v, None)
        bank.commit()
        whole = length // 4 * 4
        seen[0].append(k[:, :, :whole])
        seen[1].append(v[:, :, :whole])
    return bank, [torch.cat(x, 2) for x in seen]


def by_hand(q_K: np.ndarray, k_SK: np.ndarray, v_SK: np.ndarray, chunks: int, scale: float) -> np.ndarray:
    """One query of one head over chunks of four, from the paper's text."""
    k_NCK, v_NCK = k_SK.reshape(-1, 4, K), v_SK.reshape(-1, 4, K)
    best = np.argsort(-(k_NCK.mean(1) @ q_K))[:chunks]
    k, v = k_NCK[best].reshape(-1, K), v_NCK[best].reshape(-1, K)
    weights = np.exp(scale * (k @ q_K))
    return weights @ v / weights.sum()


@pytest.mark.parametrize("scores", [1 << 24, 500])
def test_lookup_is_that_of_brute_force_for_every_head_and_token(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    monkeypatch.setattr(module, "_SCORES", scores)
    bank, (k, v) = filled(11, 9, 8)
    q = torch.randn(2, H, 7, K, dtype=torch.float64)
    y, has = bank.attend(q, 3, scale=0.4)
    assert has.tolist() == [True, True]
    for b in range(2):
        found = bank.search(b, q[b], 3)
        for h in range(H):
            for t in range(7):
                assert len(set(found[h, t].tolist())) == 3
                wanted = by_hand(q[b, h, t].numpy(), k[b, h // 2].numpy(), v[b, h // 2].numpy(), 3, 0.4)
                np.testing.assert_allclose(y[b, h, t].numpy(), wanted, rtol=0, atol=1e-10)


def test_gradient_reaches_queries_and_is_that_of_plain_attention() -> None:
    bank, (k, v) = filled(8)
    q = torch.randn(2, H, 3, K, dtype=torch.float64, requires_grad=True)
    bank.attend(q, 5, scale=0.4)[0].square().sum().backward()
    plain = q.detach().clone().requires_grad_()
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    ((0.4 * plain @ k.transpose(2, 3)).softmax(-1) @ v).square().sum().backward()  # all of it is looked up
    torch.testing.assert_close(q.grad, plain.grad)


def test_one_chunk_along_a_query_rules_what_is_found() -> None:
    bank, _ = filled(20)
    q = torch.randn(1, H, 1, K, dtype=torch.float64).expand(2, H, 1, K)
    planted = q[:, ::2].expand(2, G, 4, K) * 50
    value = torch.full((2, G, 4, K), 3.0, dtype=torch.float64)
    bank.hold(planted, value, None)
    bank.commit()
    y, _ = bank.attend(q[:, ::2].repeat_interleave(2, 1), 2, scale=1.0)
    torch.testing.assert_close(y, torch.full_like(y, 3.0), rtol=0, atol=1e-6)


def test_the_oldest_chunk_makes_room_and_nothing_grows_beyond_its_bound() -> None:
    bank, (k, _) = filled(16, 16, 8, 12, tokens=40)
    assert bank.size(0) == bank.capacity == 10 and bank.bytes() == Bank(2, G, K, tokens=40, dtype=torch.float64).bytes()
    kept = bank.k_RGNCK[0].flatten(1, 2)
    last = k[0, :, -40:]
    assert {tuple(x) for x in kept[0].tolist()} == {tuple(x) for x in last[0].tolist()}
    long, (k, _) = filled(100, tokens=40)  # one segment longer than the memory
    assert {tuple(x) for x in long.k_RGNCK[0].flatten(1, 2)[0].tolist()} == {tuple(x) for x in k[0, 0, -40:].tolist()}


def test_padding_and_remainders_are_not_remembered() -> None:
    bank = Bank(2, G, K, tokens=40)
    k = torch.randn(2, G, 11, K)
    bank.hold(k, k, torch.arange(11) < torch.tensor([[11], [5]]))
    bank.commit()
    assert [bank.size(b) for b in range(2)] == [2, 1]
    assert torch.equal(bank.k_RGNCK[1, :, 0], k[1, :, :4])


def test_rows_have_memories_of_their_own() -> None:
    bank, _ = filled(16)
    q = torch.randn(2, H, 3, K, dtype=torch.float64)
    before, _ = bank.attend(q, 2, scale=1.0)
    other, _ = filled(16, seed=5)
    for name, x in other.tensors().items():
        if name != "written_R":
            bank.tensors()[name][1] = x[1]
    after, _ = bank.attend(q, 2, scale=1.0)
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    bank.forget([1])
    y, has = bank.attend(q, 2, scale=1.0)
    assert has.tolist() == [True, False] and torch.equal(y[0], before[0]) and not y[1].any()


def test_a_reader_sees_rows_of_the_same_memory_and_cannot_change_it() -> None:
    bank, _ = filled(16)
    q = torch.randn(2, H, 3, K, dtype=torch.float64)
    reader = bank.reader([1, 1, 0])
    found, _ = reader.attend(q[[0, 1, 0]], 2, scale=1.0)
    torch.testing.assert_close(found[[2, 1]], bank.attend(q, 2, scale=1.0)[0])
    assert not torch.equal(found[0], found[2])  # the same queries, another row's memory
    reader.hold(torch.ones(3, G, 8, K), torch.ones(3, G, 8, K), None)
    with pytest.raises(TorchstoneError, match="nothing to commit; a forward with this bank comes first"):
        reader.commit()
    bank.forget()
    assert [reader.size(b) for b in range(3)] == [0, 0, 0]


def test_memory_survives_a_file(tmp_path: Path) -> None:
    bank, _ = filled(16, 16, 12)
    save_tensors(tmp_path / "bank.safetensors", bank.tensors())
    again = Bank(2, G, K, tokens=40, dtype=torch.float64)
    again.restore(load_tensors(tmp_path / "bank.safetensors"))
    q = torch.randn(2, H, 3, K, dtype=torch.float64)
    assert torch.equal(again.attend(q, 2, scale=1.0)[0], bank.attend(q, 2, scale=1.0)[0])
    k = torch.randn(2, G, 8, K, dtype=torch.float64)
    for each in (bank, again):
        each.hold(k, k, None)
        each.commit()
    assert torch.equal(again.k_RGNCK, bank.k_RGNCK)


def test_a_bank_of_other_sizes_is_not_restored() -> None:
    bank, _ = filled(16)
    for other in (Bank(3, G, K, tokens=40, dtype=torch.float64), Bank(2, G, K, tokens=40)):
        with pytest.raises(TorchstoneError, match="are no memory of this model and this number of rows"):
            bank.restore(other.tensors())


def same_search(index: Any, seed: int = 0) -> float:
    """Share of an exact search's chunks that another index finds, while a memory fills, forgets and is restored."""
    drawn = torch.Generator().manual_seed(seed)
    exact, other = (Bank(2, G, K, tokens=400, index=each) for each in ("exact", index))
    kept, shares = exact.tensors(), []
    for step, length in enumerate((40, 43, 200, 240, 8)):
        k = torch.randn(2, G, length, K, generator=drawn)
        for bank in (exact, other):
            bank.hold(k, k, None)
            bank.commit()
            if step == 3:
                bank.forget([1])
        if step == 2:  # as after a file
            kept = {name: x.clone() for name, x in exact.tensors().items()}
        for b in range(2):
            if exact.size(b):
                q = torch.randn(H, 9, K, generator=drawn)
                wanted, found = exact.search(b, q, 6), other.search(b, q, 6)
                assert found.shape == wanted.shape and found.dtype == wanted.dtype
                same = (wanted[..., :, None] == found[..., None, :]).sum((-1, -2))
                assert all(len(set(row)) == len(row) for row in found.flatten(0, 1).tolist())
                shares.append(float(same.sum() / wanted.numel()))
    other.restore(kept)
    exact.restore(kept)
    q = torch.randn(H, 9, K, generator=drawn)
    shares.append(
        float((exact.search(0, q, 6).sort(-1).values == other.search(0, q, 6).sort(-1).values).float().mean())
    )
    return min(shares)


def test_a_flat_index_of_faiss_finds_what_an_exact_search_finds() -> None:
    pytest.importorskip("faiss")
    assert same_search("flat") == 1.0


def test_a_graph_of_faiss_finds_most_of_it() -> None:
    pytest.importorskip("faiss")
    assert same_search("hnsw") > 0.9


def test_attention_and_gradients_through_faiss_are_those_of_an_exact_search() -> None:
    pytest.importorskip("faiss")
    found = []
    for index in ("exact", "flat"):
        bank = Bank(2, G, K, tokens=40, index=index)
        k = torch.randn(2, G, 32, K, generator=torch.Generator().manual_seed(0))
        bank.hold(k, -k, None)
        bank.commit()
        q = torch.randn(2, H, 5, K, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y, _ = bank.attend(q, 3, scale=0.4)
        y.square().sum().backward()
        found.append((y, q.grad))
    torch.testing.assert_close(found[0], found[1])


def test_a_missing_extra_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(TorchstoneError, match=r"needs the extra `memory`: pip install 'torchstone\[memory\]'"):
        Bank(1, G, K, tokens=40, index="flat")
    assert Bank(1, G, K, tokens=40).index == "exact"


def test_misuse_is_refused_in_a_sentence() -> None:
    with pytest.raises(TorchstoneError, match=r"memory\.tokens: needs a positive multiple of the chunk of 4, got 10"):
        Bank(1, G, K, tokens=10)
    bank, _ = filled(16)
    with pytest.raises(TorchstoneError, match="bank: 3 rows in the forward, 2 in the bank"):
        bank.attend(torch.zeros(3, H, 1, K), 1, scale=1.0)
    q = torch.randn(2, H, 3, K, dtype=torch.float64, requires_grad=True)
    y, _ = bank.attend(q, 2, scale=1 / math.sqrt(K))
    bank.hold(torch.randn(2, G, 4, K), torch.randn(2, G, 4, K), None)
    bank.commit()
    with pytest.raises(
        TorchstoneError, match="changed between a forward and its backward pass; commit after the latter"
    ):
        y.sum().backward()
