"""Reward models in what is asked of all objectives."""

from typing import Any

import tiny

EXEMPT = {"nan": "a text's reward is read at its last token, whatever follows it"}
GOLDEN: dict[str, Any] = {
    "data": {"kind": "preferences", "path": "none"},
    "model": {"head": {"kind": "classification", "classes": 1, "pool": "last"}},
    "objective": {"centering": 0.1},
}
GRADIENT = tiny.compared, {"model": {**tiny.MODEL, "depth": 2}, "objective": {"centering": 0.2}}
