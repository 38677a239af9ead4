"""Direct preference optimisation in what is asked of all objectives."""

import tiny

GOLDEN = {"data": {"kind": "preferences", "path": "none"}, "init_from": "none"}
GRADIENT = tiny.preferences, {"model": {**tiny.MODEL, "depth": 2}, "objective": {"beta": 0.5}}
