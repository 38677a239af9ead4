"""Masked language modelling in what is asked of all objectives."""

import tiny

GOLDEN = {"model": {"causal": False, "head": {"kind": "mlm"}}}
GRADIENT = tiny.recipe, {**tiny.MASKED, "model": {**tiny.MASKED["model"], "depth": 2, "norm": "layernorm"}}
