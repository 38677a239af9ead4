"""Link prediction in what is asked of all objectives; pieces of a batch are in test_knowledge_graph_training.py."""

from __future__ import annotations

import torch

from golden.batches import Tokens
from torchstone.keys import Key
from torchstone.objectives import Batch


class Triples(Tokens):
    """Facts of a ring, i + r + 1 = j, with the head taken away at odd steps."""

    def batch(self, key: Key, step: int, size: int, *rest: int) -> Batch:
        generator = Key(0).fold("triples", step).generator()
        head, relation = (torch.randint(0, most, (size,), generator=generator) for most in (13, 3))
        return {"head": head, "relation": relation, "tail": (head + relation + 1) % 13,
                "seeks_head": torch.full((size,), step % 2 == 1),
                "negative": torch.randint(0, 13, (size, 5), generator=generator),
                "weight": 1 + relation.float()}  # fmt: skip


BATCHES = Triples
GOLDEN = {
    "model": {"kind": "house", "entities": 13, "relations": 3, "dim": 12, "block": 3, "projections": 2},
    "data": {"kind": "triples", "path": "none"},
    "objective": {"regulariser": 0.1},
}
