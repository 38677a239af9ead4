"""Which keys a query may see, derived from integer columns of the tokens; and how that is lowered to a kernel.

A `Mask` is a set of terms, all of which must allow a pair: ``CAUSAL & Window(128)``. Terms are pure functions of the
query's and the key's `Tokens`, so packed documents, padding, caches, rings and roles need no code of their own.

Shapes: B rows, T queries, S keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from torchstone.errors import TorchstoneError
from torchstone.model.tokens import Tokens

__all__ = [
    "BIDIRECTIONAL",
    "CAUSAL",
    "Blocks",
    "Lowered",
    "Mask",
    "Relation",
    "Roles",
    "Term",
    "Window",
    "holds",
    "lower",
    "mask_named",
]

Relation = Literal["same", "last", "general"]
"""What the host knows and a tensor does not: the keys are the queries ("same"); there is one query, it is the newest
token and every key before it is present and filled ("last"); or nothing is known ("general")."""

_LARGEST = 4096
"""No T x S matrix is held beyond this many queries and keys: longer sequences go block by block."""


@dataclass(frozen=True)
class Term:
    """One condition. `name` is what a part lists in the masks that it can honour."""

    name: ClassVar[str]

    def allow(self, q: Tokens, k: Tokens) -> torch.Tensor:
        """Boolean (B|1, T, S): True where the query may see the key."""
        raise NotImplementedError

    def trivial(self, q: Tokens, k: Tokens, relation: Relation) -> bool:
        """Whether the term is known, without looking at a tensor, to allow every pair."""
        return False

    @property
    def reach(self) -> int | None:
        """Places back, the query's own included, beyond which it allows no key; None if there is no such bound."""
        return None


@dataclass(frozen=True)
class _Causal(Term):
    name: ClassVar[str] = "causal"

    def allow(self, q: Tokens, k: Tokens) -> torch.Tensor:
        return k.index[:, None, :] <= q.index[:, :, None]

    def trivial(self, q: Tokens, k: Tokens, relation: Relation) -> bool:
        return relation == "last" or (relation == "same" and q.index.shape[1] == 1)


@dataclass(frozen=True)
class _Document(Term):
    name: ClassVar[str] = "document"

    def allow(self, q: Tokens, k: Tokens) -> torch.Tensor:
        q_start = torch.zeros_like(q.index) if q.start is None else q.start
        k_start = torch.zeros_like(k.index) if k.start is None else k.start
        return k_start[:, None, :] == q_start[:, :, None]

    def trivial(self, q: Tokens, k: Tokens, relation: Relation) -> bool:
        return q.start is None and k.start is None


@dataclass(frozen=True)
class _Valid(Term):
    name: ClassVar[str] = "valid"

    def allow(self, q: Tokens, k: Tokens) -> torch.Tensor:
        assert k.valid is not None
        allowed = k.valid[:, None, :]
        # a padding query sees what the other terms let it see: its output is never used, but must not be NaN
        return allowed if q.valid is None else allowed | ~q.valid[:, :, None]

    def trivial(self, q: Tokens, k: Tokens, relation: Relation) -> bool:
        return k.valid is None


@dataclass(frozen=True)
class Window(Term):
    """The query and the `size` - 1 tokens before it; with a bidirectional mask, as many after it."""

    name: ClassVar[str] = "window"
    size: int = 0

    def allow(self, q: Tokens, k: Tokens) -> torch.Tensor:
        return (q.index[:, :, None] - k.index[:, None, :]).abs() < self.size

    def trivial(self, q: Tokens, k: Tokens, relation: Relation) -> bool:
        return relation in ("same", "last") and k.index.shape[1] <= self.size

    @property
    def reach(self) -> int | None:
        return self.size


@dataclass(frozen=True)
class Blocks(Term):
    """The query's own block of `size` tokens and the one before it, counted from the document's first token.

    ``CAUSAL & Blocks(l // 2)`` is blockwise causal attention (Sun et al. 2022, arXiv 2212.10554, section 3.3): a model
    trained on l tokens reads any number of them, no key is more than l - 1 away, and up to l tokens it is causal.
    """

    name: ClassVar[str] = "blocks"
    size: int = 0

    def allow(self, q: Tokens, k: Tokens) -> torch.Tensor:
        # positions and not indices, so that padding on the left moves no border
        back = q.where[:, :, None] // self.size - k.where[:, None, :] // self.size
        return (back == 0) | (back == 1)

    def trivial(self, q: Tokens, k: Tokens, relation: Relation) -> bool:
        return relation in ("same", "last") and k.position is None and k.index.shape[1] <= self.size

    @property
    def reach(self) -> int | None:
        return 2 * self.size


@dataclass(frozen=True)
class Roles(Term):
    """Who sees whom by the column `role`, a step a token (UniLMv2, Bao et al. 2020, arXiv 2002.12804, section 3.3).

    Tokens of step t >= 0 see those of steps 0 to t; stand-ins of step t, with role -t, see those of steps 0 to t - 1
    and the other stand-ins of step t. Nobody else sees a stand-in.
    """

    name: ClassVar[str] = "role"

    def allow(self, q: Tokens, k: Tokens) -> torch.Tensor:
        assert q.role is not None and k.role is not None, "the mask of roles needs tokens with a role"
        of_q, of_k = q.role[:, :, None], k.role[:, None, :]
        # what stands for step t sees what was there before it
        seen = torch.where(of_q < 0, -of_q - 1, of_q)
        return ((of_k >= 0) & (of_k <= seen)) | ((of_q < 0) & (of_k == of_q))


@dataclass(frozen=True)
class Mask:
    """All of `terms`, and documents and padding besides: those are never optional."""

    terms: tuple[Term, ...] = ()

    def __and__(self, other: Mask | Term) -> Mask:
        more = (other,) if isinstance(other, Term) else other.terms
        return Mask(self.terms + tuple(term for term in more if term not in self.terms))

    @property
    def names(self) -> frozenset[str]:
        """Names of the terms, to compare with what a part can honour."""
        return frozenset(term.name for term in self.terms)

    @property
    def causal(self) -> bool:
        """Whether no query sees a later token: what decoding with a state needs."""
        return _Causal() in self.terms

    @property
    def reach(self) -> int | None:
        """Places back, the query's own included, beyond which no key is seen; None if there is no such bound."""
        return min((term.reach for term in self.terms if term.reach is not None), default=None)

    def allow(self, q: Tokens, k: Tokens) -> torch.Tensor:
        """Boolean (B|1, T, S) of all terms, documents and padding: the definition that every lowering must equal."""
        allowed = torch.ones(1, q.index.shape[1], k.index.shape[1], dtype=torch.bool, device=q.index.device)
        for term in (*self.terms, _Document(), _Valid()):
            if not (isinstance(term, _Valid) and k.valid is None):
                allowed = allowed & term.allow(q, k)
        return allowed


BIDIRECTIONAL = Mask()
CAUSAL = Mask((_Causal(),))


def mask_named(words: str) -> Mask:
    """A causal mask by its name on the command line: "full", "window:128" or "blocks:64".

    Raises:
        TorchstoneError: it is none of these.
    """
    name, _, size = words.partition(":")
    if words == "full":
        return CAUSAL
    term = {"window": Window, "blocks": Blocks}.get(name)
    if term is None or not size.isdecimal() or not int(size):
        raise TorchstoneError(f"attention: is full, window:SIZE or blocks:SIZE with a size in tokens, not {words!r}")
    return CAUSAL & term(int(size))


@dataclass(frozen=True)
class Lowered:
    """A mask as a kernel takes it: SDPA's causal flag, a boolean matrix, or a function that makes one in blocks."""

    causal: bool = False
    matrix_B1TS: torch.Tensor | None = None
    mask_of: Callable[[int, int], tuple[int, int, torch.Tensor | None]] | None = None


def holds(T: int, S: int) -> bool:
    """Whether a matrix of T queries and S keys may be held."""
    return T == 1 or max(T, S) <= _LARGEST


def lower(mask: Mask, q: Tokens, k: Tokens, relation: Relation, flags: bool = True) -> Lowered:
    """The cheapest form of `mask` for these tokens that is exact.

    `flags` False asks for no causal flag, because a score bias will be added to the matrix.
    """
    terms = [term for term in (*mask.terms, _Document(), _Valid()) if not term.trivial(q, k, relation)]
    if flags and not terms:
        return Lowered()
    if flags and terms == [_Causal()] and relation == "same":
        return Lowered(causal=True)
    if not holds(q.index.shape[1], k.index.shape[1]):
        return Lowered(mask_of=_blocks(terms, q, k, relation))
    return Lowered(matrix_B1TS=_matrix(terms, q, k))


def _matrix(terms: list[Term], q: Tokens, k: Tokens) -> torch.Tensor | None:
    if not terms:
        return None
    allowed = terms[0].allow(q, k)
    for term in terms[1:]:
        allowed = allowed & term.allow(q, k)
    return allowed[:, None]


def _blocks(
    terms: list[Term], q: Tokens, k: Tokens, relation: Relation
) -> Callable[[int, int], tuple[int, int, torch.Tensor | None]]:
    # positions of one's own may stand still, and a reach in positions is then none in tokens
    terms_of_tokens = terms if k.position is None else [term for term in terms if isinstance(term, Window)]
    windows = [term.reach for term in terms_of_tokens if term.reach is not None]
    causal = _Causal() in terms

    def mask_of(a: int, b: int) -> tuple[int, int, torch.Tensor | None]:
        first, last = 0, k.index.shape[1]
        if relation == "same":  # key j is token j: what lies outside the window or in the future is never touched
            first = max(0, a - min(windows) + 1) if windows else 0
            last = b if causal else min(last, b + min(windows) - 1) if windows else last
        return first, last, _matrix(terms, q.slice(a, b), k.slice(first, last))

    return mask_of
