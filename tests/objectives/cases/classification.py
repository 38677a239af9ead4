"""Classification in what is asked of all objectives."""

import tiny

GOLDEN = {"model": {"causal": False, "head": {"kind": "classification", "pool": "last"}}}
GRADIENT = tiny.labelled, {"model": {**tiny.MODEL, "depth": 2}, "objective": {"smoothing": 0.1}}
