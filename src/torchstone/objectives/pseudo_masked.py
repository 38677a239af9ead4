"""Pseudo-masked language modelling (UniLMv2, Bao et al. 2020, arXiv 2002.12804): one pass over a text predicts its
masked tokens twice, all at once as BERT does, and block after block in a random order.

    L = - sum_{i in M} log p(x_i | x_without_M)                                       autoencoding (eq. 1)
        - sum_t sum_{i in M_t} log p(x_i | x_without_M, x_{M_1}, ..., x_{M_{t-1}})      partially autoregressive (eq. 2)

The sequence is n tokens with the mask token in masked places, then the masked tokens themselves, then as many stand-ins
(section 3.3). All three of a place share its position. Who sees whom is `torchstone.model.mask.Roles`: the text has
role 0, a masked token of block t role t, its stand-in role -t. Blocks of 2 to 6 tokens and single ones are drawn until
15 % are masked (section 3.2); the order of drawing is the order of prediction.

Shapes: B rows, T tokens of a text (n), M masked tokens at most, U = T + 2 M, N predicted tokens of a batch.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.mask import Mask, Roles
from torchstone.objectives import Batch, Facts, Objective, ObjectiveSpec, Result, Term, tokens_of
from torchstone.ops.cross_entropy import linear_cross_entropy

__all__ = ["PseudoMasked", "PseudoMaskedSpec", "draw_blocks"]

_MASK = Mask((Roles(),))
_IGNORE, _TRIES = -100, 20


class PseudoMaskedSpec(ObjectiveSpec):
    """Predict masked tokens all at once and block after block, in one pass."""

    paper: ClassVar[str] = "Bao et al. 2020, arXiv 2002.12804"

    rate: float = Field(0.15, gt=0, le=0.5)
    """Share of tokens masked, at least."""
    blocks: float = Field(0.4, ge=0, le=1)
    """Chance that a block has several tokens, 2 to `longest`."""
    longest: int = Field(6, ge=2, le=64)
    """Tokens of a block, at most."""
    ae: float = Field(1.0, ge=0)
    """Weight of the prediction all at once (autoencoding)."""
    par: float = Field(1.0, ge=0)
    """Weight of the prediction block after block (partially autoregressive)."""
    stand_in: int | None = Field(None, ge=0)
    """Id of the token that stands in; None takes the padding token, which nothing sees otherwise."""

    @model_validator(mode="after")
    def _predicts(self) -> PseudoMaskedSpec:
        if not self.ae and not self.par:
            raise ValueError("ae and par are both 0: nothing is predicted")
        return self

    def build(self, facts: Facts) -> Objective:
        if facts.mask is None or facts.vocabulary is None:
            raise TorchstoneError("objective pseudo_masked: the tokenizer has no mask token")
        stand_in = facts.pad if self.stand_in is None else self.stand_in
        if stand_in is None or stand_in in (facts.mask, facts.separator) or stand_in >= facts.vocabulary:
            raise TorchstoneError(
                "objective pseudo_masked: needs a second token beside the mask token; set stand_in to the id of one "
                "that texts do not use"
            )
        return PseudoMasked(self, facts, stand_in)


class PseudoMasked(Objective):
    """Batch: ids (B, T). `prepare` adds `pseudo` (B, U), ids of all three groups, `targets` (B, U), -100 elsewhere, and
    columns `role`, `position`, `start` and `valid` for them."""

    def __init__(self, spec: PseudoMaskedSpec, facts: Facts, stand_in: int) -> None:
        super().__init__()
        self.spec, self.facts, self.stand_in = spec, facts, stand_in

    def check(self, model: nn.Module) -> None:
        if getattr(model, "decoder", None) is not None:
            raise TorchstoneError("objective pseudo_masked: needs causal: false; the mask of roles says who sees whom")

    def prepare(self, batch: Batch, key: Key) -> Batch:
        ids_BT, device = batch["ids"].cpu().numpy(), batch["ids"].device
        B, T = ids_BT.shape
        start_BT = batch["start"].cpu().numpy() if "start" in batch else np.zeros((B, T), np.int64)
        known_BT = batch["valid"].cpu().numpy() if "valid" in batch else np.ones((B, T), bool)
        special = [t for t in (self.facts.separator, self.facts.pad, self.facts.mask, self.stand_in) if t is not None]
        free_BT = known_BT & ~np.isin(ids_BT, special)
        M = math.ceil(self.spec.rate * T) + self.spec.longest - 1
        shape = B, T + 2 * M
        pseudo, targets = np.full(shape, self.facts.pad or 0), np.full(shape, _IGNORE)
        role, position, start = (np.zeros(shape, np.int64) for _ in range(3))
        valid = np.zeros(shape, bool)
        pseudo[:, :T], start[:, :T], valid[:, :T] = ids_BT, start_BT, known_BT
        position[:, :T] = np.arange(T) - start_BT
        rng = key.fold("blocks").numpy()
        for b in range(B):
            drawn = draw_blocks(free_BT[b], start_BT[b], self.spec, rng, self.spec.rate * known_BT[b].sum())
            step = 0
            for t, (first, last) in enumerate(drawn, 1):
                places = np.arange(first, last)
                at = T + step + np.arange(last - first)
                pseudo[b, places], pseudo[b, at], pseudo[b, at + M] = self.facts.mask, ids_BT[b, places], self.stand_in
                targets[b, places] = targets[b, at + M] = ids_BT[b, places]
                role[b, at], role[b, at + M] = t, -t
                for group in (at, at + M):
                    position[b, group], start[b, group], valid[b, group] = (
                        position[b, places],
                        start_BT[b, places],
                        True,
                    )
                step += last - first
        columns = {"pseudo": pseudo, "targets": targets, "role": role, "position": position, "valid": valid}
        if "start" in batch:
            columns["start"] = start
        return {**batch, **{name: torch.from_numpy(value).to(device) for name, value in columns.items()}}

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        T, there = batch["ids"].shape[1], batch["targets"] >= 0
        return {"ae": there[:, :T].sum(), "par": there[:, T:].sum(), "tokens": batch["valid"][:, :T].sum()}

    def forward(self, model: nn.Module, batch: Batch, key: Key | None) -> Result:
        T = batch["ids"].shape[1]
        out = model(
            tokens_of(batch, batch["pseudo"]),
            outputs="none",
            mask=_MASK,
            key=None if key is None else key.tensor(batch["ids"].device),
        )
        terms = {}
        for name, weight, part in (("ae", self.spec.ae, slice(0, T)), ("par", self.spec.par, slice(T, None))):
            if not weight:
                continue
            targets = batch["targets"][:, part]
            chosen = targets >= 0
            product = model.vocabulary_head().product(out.hidden[:, part][chosen], model.embedding.table())  # type: ignore[operator, union-attr]
            nll = linear_cross_entropy(
                product.h, product.weight, targets[chosen], bias_V=product.bias, softcap=product.softcap
            )
            terms[name] = Term(nll, name, weight)
        return Result.of(terms, out.aux)


def draw_blocks(
    free_T: np.ndarray, start_T: np.ndarray, spec: PseudoMaskedSpec, rng: np.random.Generator, least: float
) -> list[tuple[int, int]]:
    """Blocks (first place, place behind the last) in the order drawn, until `least` tokens are masked.

    Args:
        free_T: which places may be masked.
        start_T: the document of each place: no block reaches into another.
        spec: rates and sizes.
        rng: what is drawn from.
        least: tokens to mask; a text that has no room left for the blocks drawn gets fewer.
    """
    free, found, masked = free_T.copy(), [], 0
    for _ in range(len(free)):
        if masked >= least or not free.any():
            break
        length = int(rng.integers(2, spec.longest + 1)) if rng.random() < spec.blocks else 1
        for _ in range(_TRIES if length <= len(free) else 0):  # another place where this one is taken
            first = int(rng.integers(0, len(free) - length + 1))
            last = first + length
            if free[first:last].all() and start_T[first] == start_T[last - 1]:
                free[first:last] = False
                found.append((first, last))
                masked += length
                break
    return found
