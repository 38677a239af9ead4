"""MACER in what is asked of all objectives; pieces of a batch are in test_macer.py."""

from golden.batches import Images

BATCHES = Images
GOLDEN = {
    "model": {"kind": "mlp", "classes": 2, "channels": 2, "image": 8, "hidden": [16, 8]},
    "data": {"kind": "images", "path": "none"},
    "objective": {"copies": 3, "beta": 4},
}
