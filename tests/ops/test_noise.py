"""Counter-based noise: uniform, independent, and the same bits everywhere."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from torchstone.keys import Key
from torchstone.ops import noise

KEYS = [Key(0), Key(1), Key(-(2**63)), Key(2**63 - 1), Key(0).fold("dropout", 3)]


def splitmix64(key: int, counter: int) -> int:
    """The finaliser of Steele, Lea and Flood 2014, in Python's integers."""
    mask = 2**64 - 1
    x = (key + (counter + 1) * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


@pytest.mark.parametrize("key", KEYS, ids=lambda key: str(key.value))
def test_bits_are_those_of_splitmix64(key: Key) -> None:
    ours = [value % 2**64 for value in noise.bits(key.tensor(), 50).tolist()]
    assert ours == [splitmix64(key.value % 2**64, i) for i in range(50)]


def test_bits_are_the_published_ones() -> None:
    first = [value % 2**64 for value in noise.bits(torch.tensor(1234567), 3).tolist()]
    assert first == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_a_constant_key_is_the_key() -> None:
    for key in KEYS:
        assert torch.equal(noise.constant_key(key.value, torch.device("cpu")), key.tensor())


def test_integer_and_tensor_counters_agree() -> None:
    key = Key(3).tensor()
    for counter in (0, 1, 2**61, 2**62 - 1):
        assert torch.equal(noise.mix(key, counter), noise.mix(key, torch.tensor(counter)))


@pytest.mark.parametrize("key", KEYS, ids=lambda key: str(key.value))
def test_uniform_numbers_are_uniform_and_inside_the_open_interval(key: Key) -> None:
    u = noise.uniform(key.tensor(), 100_000)
    assert u.dtype == torch.float32 and u.min() > 0 and u.max() < 1
    counts = torch.histc(u, bins=100, min=0, max=1)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    pairs = (u[:-1] * 10).long() * 10 + (u[1:] * 10).long()
    assert stats.chisquare(torch.bincount(pairs, minlength=100).numpy()).pvalue > 1e-4


def test_ends_of_the_interval_are_not_reached() -> None:
    for extreme in (0, -1):
        value = (noise.reference._shift(torch.tensor([extreme]), 41).to(torch.float32) + 0.5) * 2.0**-23
        assert 0 < value.item() < 1


def test_numbers_of_neighbouring_keys_and_names_are_independent() -> None:
    keys = torch.stack([Key(0).tensor() + i for i in range(20)] + [Key(0).fold(i).tensor() for i in range(20)])
    u = noise.uniform(keys, 5000).double()
    correlation = torch.corrcoef(u) - torch.eye(40)
    assert correlation.abs().max() < 5 / math.sqrt(5000)


def test_gumbel_noise_has_its_distribution_and_samples_by_softmax() -> None:
    g = noise.gumbel(Key(5).tensor(), 100_000)
    assert g.dtype == torch.float64
    assert stats.kstest(g.numpy(), "gumbel_r").pvalue > 1e-4
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0], dtype=torch.float64)
    keys = torch.stack([Key(7).fold(i).tensor() for i in range(4000)])
    chosen = (logits + noise.gumbel(keys, 4)).argmax(-1)
    expected = torch.softmax(logits, 0) * 4000
    assert stats.chisquare(torch.bincount(chosen, minlength=4).numpy(), expected.numpy()).pvalue > 1e-4


def test_row_of_keys_gives_what_each_key_gives_alone() -> None:
    keys = torch.stack([key.tensor() for key in KEYS])
    for draw in (noise.bits, noise.uniform, noise.gumbel):
        together = draw(keys, 7)
        assert together.shape == (5, 7)
        assert all(torch.equal(together[i], draw(key, 7)) for i, key in enumerate(keys))


def test_longer_draws_begin_like_shorter_ones() -> None:
    key = Key(1).tensor()
    assert torch.equal(noise.uniform(key, 1000)[:10], noise.uniform(key, 10))


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.compiler, pytest.mark.slow])]
)
def test_compiled_noise_is_the_same_bit_for_bit(backend: str) -> None:
    def draw(key: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return noise.bits(key, 99), noise.uniform(key, 99), noise.mix(key, 7), noise.gumbel(key, 99)

    compiled = torch.compile(draw, backend=backend, fullgraph=True)
    for key in KEYS:
        *exact, gumbel = draw(key.tensor())
        *again, again_gumbel = compiled(key.tensor())
        assert all(torch.equal(a, b) for a, b in zip(exact, again, strict=True))
        torch.testing.assert_close(gumbel, again_gumbel, rtol=1e-14, atol=1e-14)  # log is the library's
    torch._dynamo.reset()


def test_noise_is_made_where_the_key_is() -> None:
    assert noise.uniform(Key(1).tensor("meta"), 5).device.type == "meta"
