"""LongMem as a way to adapt a run (Wang et al. 2023, arXiv 2306.07174): the model stays as it is and remembers, and a
side network beside it learns to look things up.

The stack is `torchstone.model.stack.longmem`. Each side layer starts from the last of the backbone's layers beside it.
The final norm is the side network's, and starts from the backbone's.

    lm = LongMem.load("runs/adapted")
    lm.remember(long_text)
    print(lm.generate(["..."])[0].text)
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.generate import Completion, Engine, Sampling
from torchstone.model import ModelSpec
from torchstone.model.site import parameter_name
from torchstone.model.stack.longmem import LongMemStack, LongMemStackSpec, MemorySpec
from torchstone.model.state import State
from torchstone.model.transformer import TransformerSpec
from torchstone.recipe import AdaptSpec
from torchstone.spec import validate
from torchstone.train.checkpoint import load_tensors, save_tensors
from torchstone.train.run import RunFolder

__all__ = ["LongMem", "LongMemAdaptSpec"]

_SIDE, _NORM, _FILE = "decoder.side.", "decoder.norm.", "memory.safetensors"


class LongMemAdaptSpec(AdaptSpec):
    """Train a side network that reads the streams of `init_from` and looks up what it remembers, and nothing else."""

    paper: ClassVar[str] = LongMemStackSpec.paper

    reduction: int = Field(2, ge=1)
    """Layers of the backbone beside one of the side network."""
    memory: MemorySpec = MemorySpec()
    """What is remembered, and how much of it is looked up."""
    also: tuple[str, ...] = ()
    """Patterns of parameters of the backbone that train too ("head.*")."""

    def apply(self, spec: ModelSpec) -> ModelSpec:
        if not isinstance(spec, TransformerSpec):
            raise TorchstoneError(f"adapt longmem: needs a transformer, not model {spec.kind}")
        own = LongMemStackSpec(reduction=self.reduction, memory=self.memory)
        if spec.stack.kind not in ("plain", own.kind):
            raise TorchstoneError(f"adapt longmem: needs stack plain, not {spec.stack.kind}")
        if spec.stack.kind == own.kind and spec.stack != own:
            raise TorchstoneError("adapt longmem: the model has another side network already")
        body = {name: value for name, value in spec.dump().items() if name != "kind"}
        return validate(TransformerSpec, {**body, "stack": own.dump()}, "adapt longmem")

    def is_new(self, name: str) -> bool:
        return name.startswith(_SIDE)

    def starts_from(self, name: str) -> str | None:
        if not self.is_new(name):
            return None
        number, _, rest = name[len(_SIDE) :].partition(".")
        return f"decoder.layers.{self.reduction * (int(number) + 1) - 1}.{rest}"

    def prepare(self, model: nn.Module) -> None:
        names = {parameter_name(name): parameter for name, parameter in model.named_parameters()}
        unused = [pattern for pattern in self.also if not any(fnmatchcase(name, pattern) for name in names)]
        if unused:
            raise TorchstoneError(f"adapt.also: no parameter is named {unused[0]!r}")
        for name, parameter in names.items():
            own = name.startswith((_SIDE, _NORM))
            parameter.requires_grad_(own or any(fnmatchcase(name, pattern) for pattern in self.also))


class LongMem:
    """An adapted model and its memory.

    Args:
        engine: of a model that `adapt: {kind: longmem}` made.
        segment: tokens that are read and remembered at once; None is the model's `context`.

    Raises:
        TorchstoneError: the model has no side network, no length of a segment is known.
    """

    def __init__(self, engine: Engine, segment: int | None = None) -> None:
        stack, size = engine.model.decoder, segment or engine.model.spec.context
        if not isinstance(stack, LongMemStack):
            raise TorchstoneError(f"longmem: the model's stack is {engine.model.spec.stack.kind}; adapt it first")
        if size is None or size < stack.spec.memory.chunk:
            raise TorchstoneError(f"longmem: segment needs {stack.spec.memory.chunk} tokens or more, got {size}")
        self.engine, self.segment, self.stack = engine, size, stack
        self.bank = stack.carry(1, dtype=engine.dtype, device=engine.device)

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> LongMem:
        """The adapted run in a directory, with the memory that was saved there, if one was; `options` are those of
        `Engine.of_run`.

        Raises:
            TorchstoneError: there is no such run, or its memory is of another model.
        """
        run = RunFolder(path).require()
        lm = cls(Engine.of_run(run, **{"compile": "off", **options}))
        if (file := run.path / _FILE).is_file():
            try:
                lm.bank.restore(load_tensors(file))
            except TorchstoneError as error:
                raise TorchstoneError(f"{file}: {error}") from None
        return lm

    def save(self, path: str | Path) -> None:
        """Write the memory into a run's directory, for `load`."""
        save_tensors(RunFolder(path).require().path / _FILE, self.bank.tensors())

    @torch.no_grad()
    def remember(self, text: str | Sequence[int]) -> int:
        """Read a text segment by segment, each with what is remembered of those before it, and remember it; the oldest
        tokens make room. Gives the tokens that were kept: ends of segments that fill no chunk are not.

        Raises:
            TorchstoneError: a text without a tokenizer.
        """
        ids, kept = self._ids(text), 0
        for a in range(0, len(ids), self.segment):
            piece = torch.tensor([ids[a : a + self.segment]], device=self.engine.device)
            self.engine.model(piece, bank=self.bank, outputs="none")
            self.bank.commit()
            kept += piece.shape[1] // self.bank.chunk * self.bank.chunk
        return kept

    def _ids(self, text: str | Sequence[int]) -> list[int]:
        if not isinstance(text, str):
            return list(text)
        if self.engine.tokenizer is None:
            raise TorchstoneError("longmem: is a text, and the engine has no tokenizer; give token ids")
        return self.engine.tokenizer.encode(text)

    def forget(self) -> None:
        """Empty the memory."""
        self.bank.forget()

    @property
    def prefix(self) -> State:
        """Decode state without tokens that looks things up in the memory: for engines and scorers."""
        state = self.engine.model.state(1, 1)
        state.bank = self.bank
        return state

    def generate(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], sampling: Sampling | None = None, **more: Any
    ) -> list[Completion]:
        """Continue each prompt with what is remembered; neither prompts nor continuations are. The arguments are those
        of `torchstone.generate.Engine.generate`."""
        return self.engine.generate(prompts, sampling, prefix=self.prefix, **more)
