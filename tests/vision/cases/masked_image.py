"""Masked image modelling in what is asked of all objectives; pieces of a batch are in test_masked_image.py."""

import torch

from conformance.variants import variants
from golden.batches import VOCABULARY, Images
from torchstone.keys import Key
from torchstone.vision.tokenizers import KMeansTokenizer

MEANS = torch.rand(VOCABULARY, 8, generator=Key(0).fold("means").generator())
BATCHES = Images
FACTS = {"load": lambda run: KMeansTokenizer(MEANS, 2, 2)}
GOLDEN = {
    "model": {
        "causal": False,
        "embedding": {**variants("embedding")["patch"], "mask_token": True},
        "head": {"tied": False},
        "position": {"kind": "relative_2d", "side": 4},
    },
    "data": {"kind": "images", "path": "none"},
    "objective": {"tokenizer": "means", "mask": {"min_patches": 2}},
}
