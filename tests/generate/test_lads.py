"""Lossless anti-distillation sampling: exact and independent for each user, shared between users, counted once each."""

from __future__ import annotations

import hashlib
import hmac
import multiprocessing
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare, ttest_ind

import tiny
import torchstone
from torchstone.errors import TorchstoneError
from torchstone.generate import Engine, History, Sampling
from torchstone.generate.noise import NoiseSource
from torchstone.generate.noise.lads import Counters, Hyperplanes, LadsNoise, LadsSpec, Nearest, seed_of
from torchstone.generate.noise.seeded import SeededNoise
from torchstone.spec import validate

KEY = bytes(range(32))
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])


def source(key: bytes = KEY, counters: Counters | None = None) -> LadsNoise:
    return LadsNoise(key, lambda prompt: prompt.split()[0], counters)


def answers(noise: NoiseSource, requests: list[Any], sampling: Sampling, logits: torch.Tensor = LOGITS) -> np.ndarray:
    history = History(requests, 0, [[0]] * len(requests))
    return sampling.choose(logits.expand(len(requests), -1), history, noise).ids_B.numpy()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        *(
            pytest.param(f, marks=pytest.mark.slow)
            for f in ({"temperature": 0.6}, {"top_k": 3, "temperature": 1.5}, {"top_p": 0.8})
        ),
    ],
    ids=str,
)
def test_answers_to_one_user_are_exact_and_independent_samples(fields: dict[str, Any]) -> None:
    noise, sampling = source(), Sampling(**fields)
    drawn = answers(noise, noise.visit(["u"] * 40_000, ["how so"] * 40_000), sampling)
    wanted = sampling.adjust(LOGITS[None]).double().softmax(-1)[0].numpy() * len(drawn)
    there = wanted > 0
    assert set(np.unique(drawn)) <= set(np.flatnonzero(there))
    assert chisquare(np.bincount(drawn, minlength=5)[there], wanted[there]).pvalue > 1e-3
    pairs = np.zeros((5, 5))
    np.add.at(pairs, (drawn[:-1], drawn[1:]), 1)
    assert chi2_contingency(pairs[np.ix_(there, there)]).pvalue > 1e-3
    other = answers(noise, noise.visit(["v"] * 39_999, ["how else"] * 39_999), sampling)
    assert np.array_equal(other, drawn[:39_999])  # another user in the bucket, with as many visits
    shifted = answers(noise, noise.visit(["v"] * 100, ["why"] * 100), sampling)
    assert not np.array_equal(shifted, drawn[:100])


def test_the_seed_is_a_keyed_hash_of_bucket_and_count_alone() -> None:
    message = (5).to_bytes(8, "little") + b"topic" + (3).to_bytes(8, "little")
    assert seed_of(KEY, "topic", 3) == hmac.new(KEY, message, hashlib.sha256).digest()
    noise = source()
    first, second = noise.visit(["ann", "bob"], ["topic one", "topic two"])
    assert first == second == seed_of(KEY, "topic", 0).hex()
    assert noise.visit(["ann"], ["topic one"]) == [seed_of(KEY, "topic", 1).hex()]
    # names that run together are not one another, nor are other keys
    assert len({seed_of(KEY, "a", 1), seed_of(KEY, "a1", 0), seed_of(KEY, 11, 0), seed_of(KEY, 1, 1)}) == 4
    one, other = (source(key).gumbel(source(key).visit(["u"], ["x"]), 0, 4000)[0] for key in (KEY, KEY[::-1]))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.07


def test_shared_noise_agrees_as_often_as_the_formula_says() -> None:
    generator = torch.Generator().manual_seed(0)
    noise, requests = source(), source().visit(["u"] * 20_000, ["x"] * 20_000)
    for _ in range(3):
        p, q = (torch.randn(2, 6, generator=generator, dtype=torch.float64) * 1.5).softmax(-1)
        same = answers(noise, requests, Sampling(), p.log()) == answers(noise, requests, Sampling(), q.log())
        wanted = sum(1 / sum(max(p[j] / p[i], q[j] / q[i]) for j in range(6)) for i in range(6))
        assert abs(same.mean() - wanted) < 4 * (wanted * (1 - wanted) / 20_000) ** 0.5
        apart = (p - q).abs().sum() / 2
        assert wanted >= (1 - apart) / (1 + apart) - 1e-12


def test_two_users_get_the_same_text_whatever_the_batch(tmp_path: Path) -> None:
    run = tiny.saved(tmp_path / "run", tiny.recipe(tmp_path))
    engine, sampling = Engine.of_run(run, device="cpu"), Sampling(max_new_tokens=6)

    def asked(users: list[str], prompts: list[str]) -> list[list[int]]:
        noise = source()
        names = noise.visit(users, prompts)
        return [done.ids for done in engine.generate(prompts, sampling, requests=names, noise=noise)]

    (alone,) = asked(["ann"], ["abc def"])
    together = asked(["x", "bob", "bob", "y"], ["hij", "abc def", "abc def", "klm"])
    assert together[1] == alone != together[2]


def test_log_probabilities_of_answers_are_those_of_ordinary_samples() -> None:
    own = LOGITS.log_softmax(-1).numpy()
    noise = source()
    shared = answers(noise, noise.visit(["u"] * 5000, ["x"] * 5000), Sampling())
    plain = answers(SeededNoise(1), list(range(5000)), Sampling())
    assert not np.array_equal(shared, plain) and ttest_ind(own[shared], own[plain]).pvalue > 1e-3


def test_concurrent_visits_are_counted_once_each(tmp_path: Path) -> None:
    counters = Counters(str(tmp_path / "visits.sqlite"))
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: counters.next("u", "b"), range(100)))
    assert sorted(found) == list(range(100))
    assert counters.next("u", "b") == 100 and counters.next("v", "b") == 0


@pytest.mark.slow  # processes start slowly
def test_processes_count_together(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as processes:
        more = processes.map(_count, [str(tmp_path / "visits.sqlite")] * 6, chunksize=1)
    assert sorted(n for each in more for n in each) == list(range(60))


def _count(path: str) -> list[int]:
    counters = Counters(path)
    return [counters.next("u", "b") for _ in range(10)]


def test_paraphrases_share_a_bucket_and_other_questions_do_not() -> None:
    same = ("What is the capital of France?", "what is the capital of france")
    other = "Write a function that sorts a list of numbers"
    for bucket in (Hyperplanes(bits=10), Nearest((same[0], other))):
        assert bucket(same[0]) == bucket(same[1]) != bucket(other)
    assert 0 <= Hyperplanes(bits=3)("") < 8


def test_it_is_asked_for_on_the_command_line(tmp_path: Path, cli: Callable[..., Any]) -> None:
    tiny.saved(tmp_path / "run", tiny.recipe(tmp_path))
    (tmp_path / "key").write_text(KEY.hex())
    asked = f"{{kind: lads, key_file: {tmp_path / 'key'}, counters: {tmp_path / 'visits.sqlite'}}}"
    ask = ("generate", tmp_path / "run", "--prompt", "abc", "--max-new-tokens", 8, "--temperature", 1)
    said = [cli(*ask, "--noise", asked, "--user", user) for user in ("ann", "bob", "ann")]
    assert [each.status for each in said] == [0, 0, 0], said[0].err
    assert said[0].out == said[1].out != said[2].out
    refused = cli(*ask, "--noise", asked)
    assert refused.status == 2 and "noise lads: needs the name of the user" in refused.err
    assert "counted in this call alone" not in said[0].err
    passing = cli(*ask, "--noise", f"{{kind: lads, key_file: {tmp_path / 'key'}}}", "--user", "ann")
    assert passing.status == 0 and passing.err.count("noise lads: visits are counted in this call alone") == 1
    for noise in ((), ("--noise", "seeded")):
        refused = cli(*ask, *noise, "--user", "ann")
        assert refused.status == 2 and "user: 'ann' is for noise that goes by user" in refused.err
    assert cli(*ask, "--noise", "seeded").out == cli(*ask).out
    unknown = cli(*ask, "--noise", "ladz")
    assert unknown.status == 2 and "no noise kind 'ladz'; did you mean 'lads'" in unknown.err.replace(" (did", "; did")
    greedy = cli(*ask[:-1], 0, "--noise", asked, "--user", "ann")
    assert greedy.status == 0 and "noise lads: no effect at temperature 0" in greedy.err


def test_it_is_asked_for_in_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = torchstone.load(tiny.saved(tmp_path / "run", tiny.recipe(tmp_path, model={"position": "learned"})).path)
    (tmp_path / "key").write_text(KEY.hex())
    noise = {"kind": "lads", "key_file": str(tmp_path / "key"), "counters": str(tmp_path / "visits.sqlite")}

    def said(user: str | None, **more: Any) -> str:
        return run.generate("abc", noise=noise, user=user, max_new_tokens=8, **{"temperature": 1.0, **more})[0].text

    assert said("ann") == said("bob") != said("ann")
    with pytest.raises(TorchstoneError, match="noise lads: needs the name of the user"):
        said(None)
    with pytest.raises(TorchstoneError, match="no noise kind 'ladz'"):
        run.generate("abc", noise="ladz")
    with pytest.raises(TorchstoneError):  # a run that has not learnt to fill in, and no visit that counts
        said("cleo", suffix="xyz")
    for prompt, why in (("abc" * 100, "too long"), ("abc\ud800", "half of a surrogate pair")):
        with pytest.raises(TorchstoneError, match=why):
            run.generate(prompt, noise=noise, user="cleo", max_new_tokens=2)
        assert Counters(str(tmp_path / "visits.sqlite")).next("cleo", str(Hyperplanes(LadsSpec().bits)(prompt))) == 0
    for without in (None, "seeded"):
        with pytest.raises(TorchstoneError, match="user: 'ann' is for noise that goes by user"):
            run.generate("abc", noise=without, user="ann", max_new_tokens=2)
    assert said("ann", temperature=0.0) == said(None, temperature=0.0)
    assert "noise lads: no effect at temperature 0" in capsys.readouterr().err


def test_visits_are_counted_as_long_as_the_process_lives(tmp_path: Path) -> None:
    run = torchstone.load(tiny.saved(tmp_path / "run", tiny.recipe(tmp_path)).path)
    (tmp_path / "key").write_text(KEY[::-1].hex())
    noise = {"kind": "lads", "key_file": str(tmp_path / "key")}

    def said(user: str, noise: Any = noise, prompt: str = "abc") -> str:
        return run.generate(prompt, noise=noise, user=user, max_new_tokens=8, temperature=1.0)[0].text

    texts = [said("ann") for _ in range(3)]
    assert len(set(texts)) == 3 and [said("bob") for _ in range(3)] == texts
    # a source of one's own counts for itself, and the same
    own = LadsNoise(KEY[::-1], Hyperplanes(LadsSpec().bits))
    assert [said("ann", own) for _ in range(3)] == texts
    counters = [validate(LadsSpec, {**noise, "bits": bits}).build().counters for bits in (14, 14, 3)]
    assert counters[0] is counters[1] is counters[2]  # buckets of other hyperplanes have the same names


def test_what_cannot_be_counted_is_one_sentence(tmp_path: Path) -> None:
    other, locked, fixed = (str(tmp_path / name) for name in ("other", "locked", "fixed"))
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE visits (user TEXT, page TEXT)")
    with pytest.raises(TorchstoneError, match=r"cannot count in '.*other': its table visits is of something else"):
        Counters(other)
    counters, holder = Counters(locked), sqlite3.connect(locked, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    counters._db.execute("PRAGMA busy_timeout = 10")
    with pytest.raises(TorchstoneError, match=r"cannot count in '.*locked': database is locked"):
        counters.next("u", "b")
    holder.execute("ROLLBACK")
    assert counters.next("u", "b") == 0
    counters = Counters(fixed)
    counters._db.execute("PRAGMA query_only = ON")
    with pytest.raises(TorchstoneError, match=r"cannot count in '.*fixed': attempt to write a readonly database"):
        counters.next("u", "b")
    counters._db.execute("PRAGMA query_only = OFF")
    assert counters.next("u", "b") == 0  # nothing is left open
    for path in (str(tmp_path), str(tmp_path / "no" / "file")):
        with pytest.raises(TorchstoneError, match="cannot count in"):
            Counters(path)
    (tmp_path / "key").write_text(KEY.hex())
    with pytest.raises(TorchstoneError, match="counters '' name no file"):
        validate(LadsSpec, {"key_file": str(tmp_path / "key"), "counters": ""}).build()


def test_wrong_names_buckets_and_embeddings_are_one_sentence_and_count_nothing() -> None:
    named, wrong = ["how so", "how not"], [np.full(3, np.nan), np.ones((1, 3))]
    buckets: list[tuple[Any, str]] = [
        (lambda prompt: None if prompt == named[1] else prompt, "a bucket is a text or a whole number, not None"),
        (lambda prompt: prompt + "\ud800", "the bucket .* holds half of a surrogate pair"),
        *((lambda prompt, x=x: Hyperplanes(embed=lambda _: x)(prompt), "a vector of finite numbers") for x in wrong),
        (Nearest(("a",), embed=lambda _: wrong[0]), "a vector of finite numbers"),
    ]
    for bucket, why in buckets:
        with pytest.raises(TorchstoneError, match=why):
            (refusing := LadsNoise(KEY, bucket)).visit(["u", "u"], named)
        assert refusing.counters.next("u", named[0]) == 0
    for user in ("\ud800", None, 5):
        with pytest.raises(
            TorchstoneError, match="surrogate" if isinstance(user, str) else "needs the name of the user"
        ):
            source().visit(["u", user], named)  # type: ignore[list-item]
    assert LadsNoise(KEY, lambda _: np.int64(7)).visit(["u"], ["x"]) == [seed_of(KEY, 7, 0).hex()]
    for bits in (-3, 0, 70, 2.5):
        with pytest.raises(TorchstoneError, match=f"bits are from 1 to 62, not {bits}"):
            Hyperplanes(bits=bits)  # type: ignore[arg-type]
    with pytest.raises(TorchstoneError, match="the nearest of no prompts"):
        Nearest(())


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"short", "has 5 bytes; 32 are the least"), (b"ab" * 20, "has 20 bytes"), (None, "cannot read the key")],
)
def test_a_key_that_is_none_is_one_sentence(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    with pytest.raises(TorchstoneError, match=message):
        validate(LadsSpec, {"key_file": str(tmp_path / "key")}).build()


def test_a_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LADS_KEY", raising=False)
    with pytest.raises(TorchstoneError, match=r"needs a key; set key_file or \$LADS_KEY"):
        LadsSpec().build()
    monkeypatch.setenv("LADS_KEY", KEY.hex())
    made = LadsSpec().build()
    with pytest.raises(TorchstoneError, match="requests are named by visit"):
        made.gumbel([0], 0, 5)
    with pytest.raises(TorchstoneError, match="the key has 3 bytes"):
        LadsNoise(b"abc", str)
    with pytest.raises(TorchstoneError, match="the key is bytes, not str"):
        LadsNoise("a" * 64, str)  # type: ignore[arg-type]
    with pytest.raises(TorchstoneError, match="1 users for 2 prompts"):
        source().visit(["u"], ["a", "b"])
