"""The image tokenizer's objective in what is asked of all."""

from golden.batches import Images

BATCHES = Images
GOLDEN = {
    "model": {"kind": "discrete_vae", "codes": 8, "dim": 4, "width": 8, "stages": 1, "channels": 2, "image": 8},
    "data": {"kind": "images", "path": "none"},
}
