"""Noise sources: where the randomness of a sample comes from.

A token is ``argmax(scores + gumbel)`` (the Gumbel-max trick), an exact sample of ``softmax(scores)``. The noise is a
pure function of who asks and of the step, never of a generator's state, so a sample does not depend on its batch.
Methods that choose the noise otherwise (shared between users, carrying a watermark) are other kinds.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch

from torchstone.spec import Part, PartSpec, Spec, lazy_parts, validate

__all__ = ["NoiseSource", "NoiseSpec", "Request", "noise_for"]

__getattr__ = lazy_parts(__name__)

Request = int | str
"""Name of a generation: the same name gets the same noise."""


class NoiseSource(Protocol):
    """What `Sampling.choose` asks for noise."""

    def gumbel(
        self, requests: Sequence[Request], step: int, vocabulary: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Standard Gumbel noise (B, V) for new token number `step` (from 0) of each request.

        Row b depends on ``requests[b]`` and `step` alone.
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

    def requests(self, source: NoiseSource, prompts: Sequence[str], user: str | None) -> list[Request]:
        """Names of the generations that continue `prompts` for a user, for a source that this built.

        Raises:
            TorchstoneError: it goes by user, and there is none.
        """
        return list(range(len(prompts)))


def noise_for(
    asked: str | Mapping[str, Any] | NoiseSpec, prompts: Sequence[str], user: str | None = None, greedy: bool = False
) -> tuple[NoiseSource | None, list[Request] | None]:
    """The source that was asked for, and names in it of the generations that continue `prompts`; counts a user's visit.
    Where nothing is drawn (`greedy`), neither, and a line on stderr says so.

    Raises:
        TorchstoneError: bad input, or what `NoiseSpec.build` and `NoiseSpec.requests` raise.
    """

    class Asked(Spec):
        noise: Part[NoiseSpec]

    spec = validate(Asked, {"noise": asked}, "generate").noise
    if greedy:
        print(f"noise {spec.kind}: no effect at temperature 0", file=sys.stderr)
        return None, None
    source = spec.build()
    return source, spec.requests(source, prompts, user)
