"""Replaced-token detection in what is asked of all objectives."""

import tiny

DETECTOR = {"kind": "token_classification", "classes": 1}
GOLDEN = {"model": {"causal": False, "head": DETECTOR}, "objective": {"generator": {"depth": 1}}}
GRADIENT = (
    tiny.recipe,
    {
        "model": {**tiny.MODEL, "depth": 2, "causal": False, "head": DETECTOR},
        "objective": {"kind": "replaced_token", "generator": {"depth": 1}, "rate": 0.4},
    },
)
EXEMPT = {"no_targets": "of every token it is asked whether it is the original"}
