"""FRAGE in what is asked of all objectives."""

import torch

import tiny
from golden.batches import VOCABULARY

GOLDEN = {"objective": {"popular": 10, "weight": 0.5}}
FACTS = {"frequencies": lambda: torch.arange(VOCABULARY)}
GRADIENT = (
    tiny.recipe,
    {
        "model": {**tiny.MODEL, "depth": 2},
        "objective": {"kind": "frequency_adversary", "popular": 9, "weight": 0.5},
    },
)
EXEMPT = {"no_targets": "of every token of the table it is asked how often it is used"}
