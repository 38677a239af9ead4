"""Writing with an encoder of pseudo masks (UniLMv2, Bao et al. 2020, arXiv 2002.12804): token by token, each predicted
by a stand-in at its place and then put there as a token (section 3.5).

    text     roles 0                 the prompt, which sees itself alone
    written  roles 1, 2, ..., t - 1  in their places
    stand-in role -t                 predicts the next one

Where a prompt holds mask tokens, these are the places, from left to right, and all see what is behind them: filling in.
Without, the places are those behind the prompt: answers of a model tuned with `objective: pseudo_masked_seq2seq`. What
is written changes nothing of what was read before, so every step reads all anew: it is exact, and keeps no cache.

Shapes: B rows, U tokens of the longest row (prompt, written and stand-in), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from torchstone.data import Tokenizer
from torchstone.errors import TorchstoneError
from torchstone.generate.engine import Engine, Event, _Row
from torchstone.generate.noise import NoiseSource
from torchstone.generate.noise.seeded import SeededNoise
from torchstone.generate.sampling import Guide, History, Sampling
from torchstone.model.mask import Mask, Roles
from torchstone.model.state import State
from torchstone.model.tokens import Tokens

__all__ = ["PseudoMaskedEngine"]

_MASK = Mask((Roles(),))


class PseudoMaskedEngine(Engine):
    """Generates with one encoder that was trained with pseudo masks.

    Args:
        model: an encoder with a head over the vocabulary.
        tokenizer: of its texts, with a mask token.
        stand_in: id of the token that stands in, as in training.
        eos: tokens that end a text; None is the tokenizer's separator.

    Raises:
        TorchstoneError: the model is no such encoder.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer, stand_in: int, *, eos: int | Iterable[int] | None = None
    ) -> None:
        super().__init__(model, tokenizer, compile="off", eos=eos)
        self.stand_in, self.mask = stand_in, tokenizer.mask

    @staticmethod
    def _check_model(model: nn.Module) -> None:
        if getattr(model, "encoder", None) is None or getattr(model, "decoder", None) is not None:
            raise TorchstoneError("generate: pseudo masks need an encoder (causal: false)")
        model.check_mask(_MASK)  # type: ignore[operator]

    def _budget(self, ids: list[int], asked: int, limit: int | None) -> int:
        """As many as there are mask tokens; without, as many as have positions."""
        holes = ids.count(self.mask) if self.mask is not None else 0
        if limit is not None and not holes and len(ids) >= limit:
            raise TorchstoneError(
                f"prompt: {len(ids)} tokens and one to write are more than the model's {limit} positions"
            )
        return holes or (asked if limit is None else min(asked, limit - len(ids)))

    def _run(
        self,
        rows: list[_Row],
        sampling: Sampling,
        noise: NoiseSource | None,
        guides: Sequence[Guide],
        prefix: State | None,
        routes: bool = False,
    ) -> Iterator[Event]:
        if prefix is not None or routes:
            raise TorchstoneError("generate: prefix and routes are for a decoder; this is an encoder with pseudo masks")
        noise, live, step = SeededNoise(sampling.seed) if noise is None else noise, list(rows), 0
        while live:
            seen_BV = None
            if sampling.repetition_penalty != 1.0:
                seen_BV = self._seen(live)
                for b, row in enumerate(live):
                    seen_BV[b, row.history] = True
            history = History([row.request for row in live], step, [row.history for row in live], seen_BV)
            choice = self._choose(sampling, self._predicted(live), history, noise, guides)
            yield from self._take(live, choice.ids_B, choice)
            step += 1
            self.steps += 1
            live = [row for row in live if row.finish is None]

    @torch.no_grad()
    def _predicted(self, rows: Sequence[_Row]) -> torch.Tensor:
        """Logits (B, V) of each row's next token."""
        columns: dict[str, list[list[int]]] = {"ids": [], "role": [], "position": [], "valid": []}
        U = max(len(row.history) for row in rows) + 1
        for row in rows:
            n, t = len(row.prompt), row.step
            holes = [place for place, token in enumerate(row.prompt) if token == self.mask]
            places = holes[: t + 1] if holes else [*range(n, n + t + 1)]
            pad = [0] * (U - n - t - 1)
            # padding on the left, so that all stand-ins are last
            columns["ids"].append([*pad, *row.history, self.stand_in])
            columns["role"].append([*pad, *[0] * n, *range(1, t + 1), -t - 1])
            columns["position"].append([*pad, *range(n), *places])
            columns["valid"].append([*pad, *[1] * (n + t + 1)])
        made = {name: torch.tensor(value, device=self.device) for name, value in columns.items()}
        made["valid"] = made["valid"].bool()
        out = self.model(Tokens.of(made.pop("ids"), **made), mask=_MASK, outputs="last")
        assert out.logits is not None
        return out.logits[:, -1]
