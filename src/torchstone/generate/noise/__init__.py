"""Noise sources: where the randomness of a sample comes from.

A token is ``argmax(scores + gumbel)`` (the Gumbel-max trick), an exact sample of ``softmax(scores)``. The noise is a
pure function of who asks and of the step, never of a generator's state, so a sample does not depend on its batch.
Methods that choose the noise otherwise (shared between users, carrying a watermark) are other kinds.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

from torchstone.errors import TorchstoneError
from torchstone.spec import Part, PartSpec, Spec, lazy_parts, validate

__all__ = ["NoiseSource", "NoiseSpec", "Request", "VisitedSource", "noise_for"]

__getattr__ = lazy_parts(__name__)

Request = int | str
"""Name of a generation: the same name gets the same noise."""


@runtime_checkable
class NoiseSource(Protocol):
    """What `Sampling.choose` asks for noise."""

    def gumbel(
        self, requests: Sequence[Request], step: int, vocabulary: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Standard Gumbel noise (B, V) for new token number `step` (from 0) of each request.

        Row b depends on ``requests[b]`` and `step` alone.
        """
        ...


@runtime_checkable
class VisitedSource(NoiseSource, Protocol):
    """A source that goes by user."""

    def visit(self, users: Sequence[str], prompts: Sequence[str]) -> list[Request]:
        """Count each user's visit, and name the generation that continues the prompt.

        Raises:
            TorchstoneError: a user without a name.
        """
        ...


class NoiseSpec(PartSpec):
    """Where the randomness of samples comes from."""

    family: ClassVar[str] = "noise"
    default_kind: ClassVar[str] = "seeded"

    def build(self) -> NoiseSource:
        """The source.

        Raises:
            TorchstoneError: what it needs (a key, a file) is not there.
        """
        raise NotImplementedError

    def forgotten(self) -> str | None:
        """What ends with this process though the next one would need it, in words; None if nothing does."""
        return None


def noise_for(
    asked: str | Mapping[str, Any] | NoiseSpec | NoiseSource | None,
    prompts: Sequence[str],
    user: str | None = None,
    greedy: bool = False,
    once: bool = False,
) -> tuple[NoiseSource | None, list[Request] | None]:
    """The source that was asked for, if any, and names in it of the generations that continue `prompts` (None: their
    numbers); counts a user's visit. Where nothing is drawn (`greedy`), neither, and a line on stderr says so; another
    says what is lost where the process ends after this (`once`).

    Raises:
        TorchstoneError: bad input, a user and no noise that goes by user or the reverse, or what `NoiseSpec.build` and
            `VisitedSource.visit` raise.
    """

    class Asked(Spec):
        noise: Part[NoiseSpec]

    source = asked if isinstance(asked, NoiseSource) else None
    spec = None if asked is None or source is not None else validate(Asked, {"noise": asked}, "generate").noise
    name = type(source).__name__ if spec is None else spec.kind
    if greedy and asked is not None:
        print(f"noise {name}: no effect at temperature 0", file=sys.stderr)
        return None, None
    if spec is not None:
        source = spec.build()
    if isinstance(source, VisitedSource):
        names = source.visit([user or ""] * len(prompts), prompts)
        if once and spec is not None and (forgotten := spec.forgotten()) is not None:
            print(f"noise {name}: {forgotten}", file=sys.stderr)
        return source, names
    if user is not None:
        raise TorchstoneError(f"user: {user!r} is for noise that goes by user, as {{kind: lads}} does")
    return source, None
