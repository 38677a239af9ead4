"""Trajectories: what a policy wrote after a prompt, as ids and numbers, kept when it was written.

Nothing of it is ever made from text again: ids that are decoded and encoded may come back as other ids. What the loss
is over follows from who wrote a token: all of `ids`, the end token among them, and nothing of `prompt`.

Shapes: R rows, T tokens of a row, L routed layers, K experts of a token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchstone.data.blocks import IGNORE
from torchstone.data.hashing import digest
from torchstone.errors import TorchstoneError
from torchstone.files import full_disk
from torchstone.generate.engine import Finish
from torchstone.objectives import Batch

__all__ = ["Trajectory", "batch_of", "dump", "read"]

_MOST = int(np.iinfo(np.int16).max)
"""The highest number of an expert that a batch can hold."""


@dataclass(frozen=True)
class Trajectory:
    """One answer to a prompt.

    Attributes:
        prompt: ids that stood there.
        ids: ids that the policy wrote, the end token too.
        logprobs: of each of `ids`, in the distribution that it was drawn from.
        finish: "eos", or "length" where the answer was cut.
        example: number of the prompt; answers to one prompt are a group.
        request: name of the answer for the noise source.
        seed: of the noise source.
        rewards: by name, those that are for the prompt; None where a rule could not score.
        reward: their weighted sum; None if one is None.
        prompt_text, text: for people and for supervised tuning, without the end token.
        routes: experts that each input token took, (len(prompt) + len(ids) - 1, L, K).
    """

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    example: int
    request: str
    seed: int
    rewards: Mapping[str, float | None]
    reward: float | None
    prompt_text: str = ""
    text: str = ""
    routes: np.ndarray | None = None

    @property
    def truncated(self) -> bool:
        """Whether it was cut before its end."""
        return self.finish == "length"


def batch_of(trajectories: Sequence[Trajectory], pad: int) -> Batch:
    """Rows to train on, in order.

    Returns:
        ``ids``, ``valid`` (R, T): prompt and answer without its last token, padded on the right; ``next`` (R, T), the
        token after each where the policy wrote it, else -100; ``sampler`` (R, T), its log-probability when it was
        drawn, else 0; ``example`` (R,); ``length`` (R,), tokens written; ``truncated`` (R,); ``routes`` (R, T, L, K),
        where trajectories have them, -1 where a token has none.
    """
    R, T = len(trajectories), max(len(t.prompt) + len(t.ids) - 1 for t in trajectories)
    ids_RT, next_RT = np.full((R, T), pad), np.full((R, T), IGNORE)
    valid_RT, sampler_RT = np.zeros((R, T), bool), np.zeros((R, T))
    for row, each in enumerate(trajectories):
        whole, first = [*each.prompt, *each.ids], len(each.prompt) - 1
        last = len(whole) - 1
        ids_RT[row, :last], valid_RT[row, :last] = whole[:-1], True
        next_RT[row, first:last], sampler_RT[row, first:last] = each.ids, each.logprobs
    batch = {
        "ids": ids_RT,
        "valid": valid_RT,
        "next": next_RT,
        "example": np.array([each.example for each in trajectories]),
        "length": np.array([len(each.ids) for each in trajectories]),
        "truncated": np.array([each.truncated for each in trajectories]),
    }
    if any(each.routes is not None for each in trajectories):
        batch["routes"] = _routes(trajectories, T)
    made = {name: torch.from_numpy(array) for name, array in batch.items()}
    return {**made, "sampler": torch.from_numpy(sampler_RT).to(torch.get_default_dtype())}


def _routes(trajectories: Sequence[Trajectory], length: int) -> np.ndarray:
    """(R, T, L, K).

    Raises:
        TorchstoneError: a trajectory's routes are not of its tokens, or of other layers than those of the others.
    """
    shape = next(each.routes.shape[1:] for each in trajectories if each.routes is not None)
    routes_RTLK = np.full((len(trajectories), length, *shape), -1, np.int16)
    for row, each in enumerate(trajectories):
        if each.routes is None:
            continue
        wanted = (len(each.prompt) + len(each.ids) - 1, *shape)
        if each.routes.shape != wanted:
            raise TorchstoneError(f"routes: of answer {row} are {each.routes.shape}, {wanted} were expected")
        routes_RTLK[row, : wanted[0]] = each.routes
    return routes_RTLK


def dump(path: Path, trajectories: Sequence[Trajectory], settings: Mapping[str, Any]) -> None:
    """Write trajectories as JSON lines, each with a hash of its ids and the settings that it was sampled with."""
    with full_disk(path), open(path, "w", encoding="utf-8") as file:
        for each in trajectories:
            row = {**asdict(each), "routes": None if each.routes is None else each.routes.tolist()}
            row |= {"sampling": dict(settings), "hash": digest(list(each.prompt), list(each.ids))}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read(path: Path) -> tuple[list[Trajectory], dict[str, Any]]:
    """What `dump` wrote: trajectories, and the settings that all were sampled with.

    Raises:
        TorchstoneError: the file cannot be read, a line is none of `dump`, its ids are not those of its hash, or
            settings differ; says which line.
    """
    from torchstone.data.corpora._lines import lines

    found, settings = [], None
    for _, where, record in lines(str(path)):
        try:
            hashed, own = record.pop("hash"), record.pop("sampling")
            routes = record.pop("routes", None)
            lists: dict[str, Any] = {name: tuple(record.pop(name)) for name in ("prompt", "ids", "logprobs")}
            each = Trajectory(**lists, **record)
        except (KeyError, TypeError, ValueError) as error:
            raise TorchstoneError(f"{where}: no trajectory ({type(error).__name__}: {error})") from None
        if hashed != digest(list(each.prompt), list(each.ids)):
            raise TorchstoneError(f"{where}: its ids are not those that were sampled (their hash differs)")
        if not each.prompt or not each.ids or len(each.logprobs) != len(each.ids):
            raise TorchstoneError(f"{where}: {len(each.ids)} ids and {len(each.logprobs)} log-probabilities")
        if routes is not None:
            each = replace(each, routes=_recorded(routes, len(each.prompt) + len(each.ids) - 1, where))
        if settings is not None and own != settings:
            raise TorchstoneError(f"{where}: was sampled with other settings than the lines before it")
        settings = own
        found.append(each)
    if settings is None:
        raise TorchstoneError(f"{path}: holds no trajectory")
    return found, settings


def _recorded(routes: Any, tokens: int, where: str) -> np.ndarray:
    try:
        array_TLK = np.asarray(routes)
    except ValueError:  # rows of different lengths
        array_TLK = np.empty(0)
    whole = array_TLK.dtype.kind == "i" and array_TLK.ndim == 3 and len(array_TLK) == tokens
    if not whole or array_TLK.min() < -1 or array_TLK.max() > _MOST:
        raise TorchstoneError(
            f"{where}: routes are whole numbers from -1 to {_MOST:,}, of {tokens} tokens as many layers each, "
            "of layers as many experts each"
        )
    return array_TLK.astype(np.int16)
