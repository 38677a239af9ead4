"""Policy gradients in what is asked of all objectives."""

import torch

import tiny
from golden.batches import Tokens
from torchstone.keys import Key
from torchstone.objectives import Batch


class Prompts(Tokens):
    """The beginnings of the same text, which a policy goes on from; it also is the tokenizer: ids are letters."""

    separator, pad = 0, 1

    def batch(self, key: Key, step: int, size: int, *rest: int) -> Batch:
        ids = super().batch(key, step, size)["ids"][:, :4].contiguous()
        return {"ids": ids, "valid": torch.ones_like(ids, dtype=torch.bool), "example": torch.arange(size)}

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(96 + token) for token in ids)


BATCHES = Prompts
FACTS = {"tokenizer": Prompts(), "rows": {number: {} for number in range(4)}}
GOLDEN = {
    "data": {"kind": "prompts", "path": "none"},
    "objective": {
        "rewards": [{"kind": "language", "alphabet": "abcdefghijklmno", "weight": -1.0}],
        "sampling": {"max_new_tokens": 4},
        "advantage": "none",
        "truncated": "keep",
    },
}
GRADIENT = tiny.prompted, {"model": {**tiny.MODEL, "depth": 2}, "objective": {"group": 2}}
