"""Multi-token prediction in what is asked of all objectives."""

import tiny
from conformance.variants import variants

STACK = {"kind": "multi_token", "predictors": 2}
GOLDEN = {"model": {"stack": variants("stack")["multi_token"]}}
GRADIENT = (
    tiny.recipe,
    {"model": {**tiny.MODEL, "depth": 2, "stack": STACK}, "objective": {"kind": "multi_token"}},
)
EXEMPT = {"nan": "predictors attend to hidden states of positions without a target, as layers do"}
