"""One decode step, compiled whole: embedding, layers, head and argmax in one graph.

The graph serves every length and every number of rows from two on (one row has a graph of its own, since compilers
treat size one apart), so nothing is compiled again while a text grows. Weights are baked in and laid out for the
processor ("freezing"); after they change, a new step must be made.

Shapes: B rows, S tokens of the longest row including the new one, V vocabulary.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from torchstone.model.context import Context, Memory
from torchstone.model.mask import CAUSAL, Mask
from torchstone.model.state import Fixed, Growing, PartState, State
from torchstone.model.tokens import Tokens
from torchstone.model.transformer import Transformer

__all__ = ["CompileFailed", "CompiledStep"]

_NUMBERS = itertools.count()


class CompileFailed(Exception):
    """The step could not be compiled; the state is as it was."""


class CompiledStep:
    """Decodes one token per row.

    Args:
        model: its weights must not change while this object is in use.
        backend: of `torch.compile`.
        mask: which of the tokens before it a token sees.
    """

    def __init__(self, model: Transformer, backend: str = "inductor", mask: Mask = CAUSAL) -> None:
        self.model, self.backend, self.mask = model, backend, mask
        self._graphs: dict[tuple[Any, ...], Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {}
        self._order_S = torch.arange(0)

    def __call__(
        self, state: State, ids_B: torch.Tensor, add_B: torch.Tensor, longest: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best next tokens (B,) and the logits (B, V).

        Args:
            state: decode state, settled, with room for two more tokens a row (were a cache ever read to its very end,
                that would be a graph of its own); it is advanced.
            ids_B: the newest token of each row.
            add_B: int64, 1 for each row; 0 for one that has ended, whose length then stays.
            longest: S - 1, tokens of the longest row.

        Raises:
            CompileFailed: with the reason in one line.
        """
        if self._order_S.shape[0] < state.extent or self._order_S.device != ids_B.device:
            self._order_S = torch.arange(state.extent, device=ids_B.device)
        order_S = self._order_S[: longest + 1]
        memory = state.memory_tokens
        # sizes of one are no sizes that vary: every pattern of them has a graph of its own
        columns = {} if memory is None else memory._columns()
        which = (ids_B.shape[0] == 1, *((name, *(size == 1 for size in x.shape)) for name, x in columns.items()))
        graph = self._graphs.get(which)
        arguments = (ids_B, state.length_B, add_B, order_S, memory, state.parts)
        if graph is not None:
            out = graph(*arguments)
        else:
            graph = self._compile()
            _mark(state, ids_B, add_B, order_S)
            out = _first(graph, arguments)
            self._graphs[which] = graph
        state.longest, state.uniform = longest + 1, False
        return out

    @staticmethod
    def settle(state: State) -> None:
        """Lay the tensors of a state out as every fork of it does; once, before its first step."""
        for part in state.parts.values():
            part.rows(torch.Tensor.contiguous)
        if state.memory_tokens is not None:
            columns = {name: x.contiguous() for name, x in state.memory_tokens._columns().items()}
            state.memory_tokens = replace(state.memory_tokens, **columns)

    def _compile(self) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        model, mask = self.model, self.mask

        def step(
            ids_B: torch.Tensor,
            length_B: torch.Tensor,
            add_B: torch.Tensor,
            order_S: torch.Tensor,
            memory: Tokens | None,
            parts: dict[str, PartState],
        ) -> tuple[torch.Tensor, torch.Tensor]:
            index_B1 = length_B[:, None]
            q = Tokens(index_B1, ids=ids_B[:, None])
            encoded = None if memory is None else Memory(None, memory)
            ctx = Context(q, Tokens(order_S[None]), mask, "general", index_B1, model.main.positions, encoded)
            hidden, _ = model.core(q.ids, ctx, "decoder", None, parts)
            logits_BV = model.head(hidden, q, model.embedding.table())[:, -1]
            length_B += add_B
            return logits_BV.argmax(-1), logits_BV

        # compiled code belongs to a code object: each graph gets one of its own, so that none is taken for another's
        code = step.__code__.replace(co_name=f"step_{next(_NUMBERS)}")
        own = types.FunctionType(code, step.__globals__, code.co_name, None, step.__closure__)
        options: dict[str, Any] | None = {"guard_filter_fn": _relevant} if self.backend == "inductor" else None
        return torch.compile(own, fullgraph=True, backend=self.backend, options=options)


def _first(graph: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """The first call of a graph, in which it is compiled."""
    import torch._inductor.config  # here, because importing Inductor takes seconds
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    # weights count as constants only where this is set while the graph is traced
    with torch._inductor.config.patch(freezing=True):
        try:
            return graph(*arguments)
        except (TorchDynamoException, InductorError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise CompileFailed(" ".join(lines[:2])[:200] or type(error).__name__) from error


def _relevant(guards: Sequence[Any]) -> list[bool]:
    """Which conditions are checked at every step: those on sizes. The rest cannot change between calls, and checking
    a thousand attributes of the model takes longer than a small layer."""
    return [guard.guard_type == "SHAPE_ENV" for guard in guards]


def _mark(state: State, ids_B: torch.Tensor, add_B: torch.Tensor, order_S: torch.Tensor) -> None:
    """Say which sizes vary: rows, tokens, and tokens of the memory."""
    varies: list[tuple[torch.Tensor, int]] = [(order_S, 0)]
    rows = [ids_B, add_B, state.length_B]
    for part in state.parts.values():
        tensors = list(part.tensors.values())
        rows += tensors
        if isinstance(part, Growing):
            varies += [(tensor, 1) for tensor in tensors]
        elif isinstance(part, Fixed):
            varies += [(tensor, 2) for tensor in tensors]
    if state.memory_tokens is not None:
        columns = list(state.memory_tokens._columns().values())
        rows += [column for column in columns if column.shape[0] == ids_B.shape[0]]
        varies += [(column, 1) for column in columns]
    if ids_B.shape[0] > 1:
        varies += [(tensor, 0) for tensor in rows]
    for tensor, axis in varies:
        if tensor.shape[axis] > 1:
            torch._dynamo.mark_dynamic(tensor, axis)
