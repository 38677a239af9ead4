"""Classification of pictures in what is asked of all objectives; pieces are in test_image_classification.py."""

from conformance.variants import variants
from golden.batches import Images

BATCHES = Images
GOLDEN = {
    "model": {
        "causal": False,
        "embedding": variants("embedding")["patch"],
        "head": {"kind": "classification", "pool": "patches"},
        "position": "learned",
    },
    "data": {"kind": "images", "path": "none"},
    "objective": {"smoothing": 0.1, "views": {"crop": 0.5, "flip": True}, "mixing": {"mixup": 0.8, "cutmix": 1.0}},
}
