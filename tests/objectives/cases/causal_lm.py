"""The usual objective in what is asked of all."""

import tiny

GRADIENT = tiny.recipe, {"model": {**tiny.MODEL, "depth": 2, "attention": {"heads": 2, "bias": "all"}}}
