"""Lossless anti-distillation sampling (Diao et al. 2026, arXiv 2605.18829): the noise of an answer is a secret function
of what is asked and of how often this user has asked it, and of nothing else.

    b = bucket(prompt),  n = visits of (user, b) before this one
    s = HMAC-SHA256(key, b || n)                       the user is not in it
    token t = argmax_v (scores_v + gumbel(s, t, v))

One user never meets a seed twice, so all answers to a user are independent exact samples of the model. Users who ask
for the same kind of thing meet the same seeds, so m accounts get no more independent noise than one: with the same
prompts the same texts, with prompts of one bucket coupled ones.

What it costs, and what it does not do: two users with the same first question get the same answer; at temperature 0
there is no noise to share; an adversary who rewords moves between buckets; a new key gives everybody fresh noise.
Counts must outlive the process where answers do (`counters`), for a count that begins anew repeats answers. From the
seed on, noise is the 64-bit counter-based stream of `torchstone.ops.noise`: exact for sampling, and no cipher.

Shapes: B rows, V vocabulary, E numbers of an embedding.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from torchstone.errors import TorchstoneError
from torchstone.generate.noise import NoiseSource, NoiseSpec, Request
from torchstone.generate.noise.seeded import SeededNoise
from torchstone.keys import Key

__all__ = ["Counters", "Hyperplanes", "LadsNoise", "LadsSpec", "Nearest", "character_grams", "seed_of"]

_LEAST = 32
"""Bytes of a key."""
_MOST_BITS = 62
"""Hyperplanes, at most."""


class LadsSpec(NoiseSpec):
    """Noise shared by all who ask for the same kind of thing equally often, independent within each user's answers."""

    paper: ClassVar[str] = "Diao et al. 2026, arXiv 2605.18829"

    key_file: str | None = None
    """File of the secret key, 32 bytes or more, or as many in hexadecimal; None reads $LADS_KEY (hexadecimal)."""
    bits: int = Field(14, ge=1, le=_MOST_BITS)
    """Hyperplanes that buckets lie between: at most 2^bits buckets."""
    counters: str | None = None
    """File (SQLite) that visits are counted in, shared by all processes; None counts in this process alone."""

    def build(self) -> NoiseSource:
        key = self._key()
        counters = _of_process(key) if self.counters is None else Counters(self.counters)
        return LadsNoise(key, Hyperplanes(self.bits), counters)

    def forgotten(self) -> str | None:
        if self.counters is not None:
            return None
        return "visits are counted in this call alone; set counters to a file that keeps them"

    def _key(self) -> bytes:
        if self.key_file is None:
            where, raw = "$LADS_KEY", os.environ.get("LADS_KEY", "").encode()
            if not raw:
                raise TorchstoneError("noise lads: needs a key; set key_file or $LADS_KEY")
        else:
            where = self.key_file
            try:
                raw = Path(self.key_file).read_bytes()
            except OSError as error:
                raise TorchstoneError(f"noise lads: cannot read the key {where!r}: {error.strerror or error}") from None
        try:
            key = bytes.fromhex(raw.decode().strip())
        except ValueError:
            key = raw
        if len(key) < _LEAST:
            raise TorchstoneError(f"noise lads: the key of {where} has {len(key)} bytes; {_LEAST} are the least")
        return key


Bucket = Callable[[str], int | str]
"""The kind of thing that a prompt asks for: paraphrases should agree, other questions should not."""


class LadsNoise:
    """See `LadsSpec`.

    Args:
        key: the secret.
        bucket: of a prompt.
        counters: visits of users; None counts in memory, for this source alone.

    Raises:
        TorchstoneError: a key that is no bytes, or too short.
    """

    def __init__(self, key: bytes, bucket: Bucket, counters: Counters | None = None) -> None:
        if not isinstance(key, bytes | bytearray):
            raise TorchstoneError(f"noise lads: the key is bytes, not {type(key).__name__}; bytes.fromhex makes them")
        if len(key) < _LEAST:
            raise TorchstoneError(f"noise lads: the key has {len(key)} bytes; {_LEAST} are the least")
        self._key, self.bucket = key, bucket
        self.counters = Counters() if counters is None else counters
        self._streams = _Streams()

    def visit(self, users: Sequence[str], prompts: Sequence[str]) -> list[Request]:
        """Count each user's visit to the prompt's bucket, and name the generation by its seed.

        Raises:
            TorchstoneError: a user without a name, for independence is each user's own; a name or a bucket that is
                none; counts that cannot be kept.
        """
        if len(users) != len(prompts):
            raise TorchstoneError(f"noise lads: {len(users)} users for {len(prompts)} prompts")
        if not all(isinstance(user, str) and user for user in users):
            raise TorchstoneError("noise lads: needs the name of the user, for answers are independent within each")
        buckets = [self.bucket(prompt) for prompt in prompts]
        for what, named in (("user", users), ("bucket", buckets)):  # all of them before the first is counted
            for name in named:
                _check_name(what, name)
        counts = [self.counters.next(user, str(bucket)) for user, bucket in zip(users, buckets, strict=True)]
        return [seed_of(self._key, bucket, n).hex() for bucket, n in zip(buckets, counts, strict=True)]

    def gumbel(
        self, requests: Sequence[Request], step: int, vocabulary: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Float64 (B, V) of requests that `visit` named."""
        return self._streams.gumbel(requests, step, vocabulary, device)


def _check_name(what: str, name: object) -> None:
    if not isinstance(name, str | Integral):  # NumPy's integers are integral too
        raise TorchstoneError(f"noise lads: a {what} is a text or a whole number, not {name!r}")
    try:
        str(name).encode()
    except UnicodeEncodeError:
        raise TorchstoneError(f"noise lads: the {what} {name!r} holds half of a surrogate pair") from None


@dataclass(frozen=True)
class _Streams(SeededNoise):
    """Streams that begin with the request's own bits: the seed is secret already."""

    def key(self, request: Request) -> int:
        if not isinstance(request, str):
            raise TorchstoneError(f"noise lads: requests are named by visit(users, prompts), not {request!r}")
        return int.from_bytes(bytes.fromhex(request)[:8], "little", signed=True)


def seed_of(key: bytes, bucket: int | str, n: int) -> bytes:
    """The seed (32 bytes) of the n-th visit (from 0) to a bucket: no user, time or process is in it."""
    name = str(bucket).encode()
    return hmac.digest(key, len(name).to_bytes(8, "little") + name + n.to_bytes(8, "little"), hashlib.sha256)


# ------------------------------------------------------------------------------------------------------------ counts


class Counters:
    """How often each user has visited each bucket, counted atomically over threads and processes.

    Args:
        path: an SQLite file; None keeps counts in memory.

    Raises:
        TorchstoneError: the file cannot be counted in.
    """

    def __init__(self, path: str | None = None) -> None:
        if path == "":
            raise TorchstoneError("noise lads: counters '' name no file; without counters visits are counted in memory")
        self._lock, self._path = threading.Lock(), ":memory:" if path is None else path
        with self._explained():
            self._db = sqlite3.connect(self._path, timeout=60, isolation_level=None, check_same_thread=False)
            self._db.execute("CREATE TABLE IF NOT EXISTS visits (user TEXT, bucket TEXT, n INTEGER, "
                             "PRIMARY KEY (user, bucket))")  # fmt: skip
            columns = [(row[1], row[5]) for row in self._db.execute("PRAGMA table_info(visits)")]
            if columns != [("user", 1), ("bucket", 2), ("n", 0)]:
                raise sqlite3.Error("its table visits is of something else")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise TorchstoneError(f"noise lads: cannot count in {self._path!r}: {error}") from None

    def next(self, user: str, bucket: str) -> int:
        """Visits before this one, which counts from now on.

        Raises:
            TorchstoneError: the file is locked for too long, or cannot be written.
        """
        with self._lock, self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            with self._db:  # commits, or takes all back
                row = self._db.execute("SELECT n FROM visits WHERE user = ? AND bucket = ?", (user, bucket)).fetchone()
                n = 0 if row is None else int(row[0])
                self._db.execute("INSERT OR REPLACE INTO visits VALUES (?, ?, ?)", (user, bucket, n + 1))
        return n


_KEYS: dict[bytes, Counters] = {}
_KEYS_LOCK = threading.Lock()


def _of_process(key: bytes) -> Counters:
    """The counts in memory of all that is built without a file: one for each key, whatever its buckets, so that no user
    meets a seed twice while the process lives."""
    name = hashlib.sha256(key).digest()
    with _KEYS_LOCK:
        if name not in _KEYS:
            _KEYS[name] = Counters()
        return _KEYS[name]


# ----------------------------------------------------------------------------------------------------------- buckets


def character_grams(text: str, size: int = 256, grams: tuple[int, ...] = (3, 4)) -> np.ndarray:
    """Hashed counts (E,) of a text's character n-grams, lower case, words apart: an embedding that needs no model."""
    found = np.zeros(size)
    words = " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
    padded = f" {words} "
    for n in grams:
        for at in range(max(0, len(padded) - n + 1)):
            found[Key(n).fold(padded[at : at + n]).value % size] += 1.0
    return found


@dataclass(frozen=True)
class Hyperplanes:
    """Locality-sensitive hashing (Charikar 2002): on which side of each hyperplane the embedding of a prompt lies."""

    bits: int = 14
    embed: Callable[[str], np.ndarray] = character_grams
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 1 <= self.bits <= _MOST_BITS:
            raise TorchstoneError(f"noise lads: bits are from 1 to {_MOST_BITS}, not {self.bits!r}")

    def __call__(self, prompt: str) -> int:
        x_E = _embedded(self.embed, prompt)
        planes = Key(self.seed).fold("hyperplanes", x_E.size).numpy().standard_normal((self.bits, x_E.size))
        return int(sum(1 << i for i, side in enumerate(planes @ x_E > 0) if side))


@dataclass(frozen=True)
class Nearest:
    """The nearest of fixed prompts by the angle of embeddings: as many buckets as there are prompts."""

    prompts: tuple[str, ...]
    embed: Callable[[str], np.ndarray] = character_grams

    def __post_init__(self) -> None:
        if not self.prompts:
            raise TorchstoneError("noise lads: the nearest of no prompts; give at least one")

    def __call__(self, prompt: str) -> int:
        known = np.stack([_unit(_embedded(self.embed, each)) for each in self.prompts])
        return int(np.argmax(known @ _unit(_embedded(self.embed, prompt))))


def _embedded(embed: Callable[[str], np.ndarray], prompt: str) -> np.ndarray:
    x_E = np.asarray(embed(prompt), np.float64)
    if x_E.ndim != 1 or not np.isfinite(x_E).all():
        raise TorchstoneError(
            "noise lads: the embedding of a prompt is a vector of finite numbers, and this one is not"
        )
    return x_E


def _unit(x_E: np.ndarray) -> np.ndarray:
    return x_E / max(float(np.linalg.norm(x_E)), 1e-12)
