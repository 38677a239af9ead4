"""Batches of the golden trainings: made up, and functions of the step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from torchstone.keys import Key
from torchstone.objectives import Batch

__all__ = ["BLOCK", "VOCABULARY", "Images", "Pairs", "Pictures", "Tokens"]

BLOCK, VOCABULARY = 12, 41


class Tokens:
    """Text of no corpus: ids that repeat with some noise, in two documents, and a label for each row."""

    bytes = tokens = 0

    def batch(self, key: Key, step: int, size: int, micro: int = 0, accumulate: int = 1, rank: int = 0,
              ranks: int = 1) -> Batch:  # fmt: skip
        generator = Key(0).fold("golden", step, micro).generator()
        phase = torch.randint(0, VOCABULARY - 4, (size, 1), generator=generator)
        noise = torch.randint(0, 3, (size, BLOCK + 1), generator=generator)
        stream = 3 + (phase + 5 * torch.arange(BLOCK + 1) + noise) % (VOCABULARY - 4)
        start = torch.where(torch.arange(BLOCK) < BLOCK // 2, 0, BLOCK // 2).expand(size, -1).contiguous()
        return {"ids": stream[:, :-1].contiguous(), "next": stream[:, 1:].contiguous(), "start": start,
                "label": phase[:, 0] % 2}  # fmt: skip

    def evaluation(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        return iter(())


class Pictures(Tokens):
    """Stripes, in the place of ids: their direction is the label."""

    def batch(self, key: Key, step: int, size: int, *rest: int) -> Batch:
        generator = Key(0).fold("pictures", step).generator()
        label = torch.randint(0, 2, (size,), generator=generator)
        stripes = torch.arange(8).float().mul(2).sin().expand(size, 2, 8, 8)
        pixels = torch.where(label.view(-1, 1, 1, 1) == 1, stripes, stripes.transpose(2, 3))
        return {"ids": pixels + 0.1 * torch.randn(pixels.shape, generator=generator), "label": label}


class Images(Pictures):
    """The same as data of images give them, with values from 0 to 1."""

    def batch(self, key: Key, step: int, size: int, *rest: int) -> Batch:
        rows = super().batch(key, step, size, *rest)
        return {"pixels": torch.sigmoid(rows["ids"]), "label": rows["label"]}


class Pairs(Tokens):
    """Two rows an example, both after one first half: one goes on by the rule, one by chance."""

    def batch(self, key: Key, step: int, size: int, micro: int = 0, accumulate: int = 1, rank: int = 0,
              ranks: int = 1) -> Batch:  # fmt: skip
        rows = super().batch(key, step, size, micro)
        chosen = torch.cat([rows["ids"], rows["next"][:, -1:]], 1)
        generator = Key(0).fold("rejected", step, micro).generator()
        rejected = torch.randint(3, VOCABULARY, chosen.shape, generator=generator)
        both = torch.stack([chosen, torch.where(torch.arange(BLOCK + 1) < BLOCK // 2, chosen, rejected)], 1)
        after = torch.where(torch.arange(BLOCK) < BLOCK // 2 - 1, -100, both[..., 1:])
        return {"ids": both[..., :-1].contiguous(), "next": after, "valid": torch.ones_like(after, dtype=torch.bool)}
