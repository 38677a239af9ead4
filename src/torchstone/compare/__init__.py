"""Comparing methods: variants times seeds under equal conditions, one decision rule, one report."""

from __future__ import annotations

from torchstone.compare.cost import Estimate
from torchstone.compare.decide import Interval, Verdict, decide
from torchstone.compare.matrix import compare_functions, compare_recipes
from torchstone.compare.options import Options
from torchstone.compare.result import Arm, Metric, Result
from torchstone.compare.variants import Variant, from_axes, from_file, from_patch

__all__ = [
    "Arm",
    "Estimate",
    "Interval",
    "Metric",
    "Options",
    "Result",
    "Variant",
    "Verdict",
    "compare_functions",
    "compare_recipes",
    "decide",
    "from_axes",
    "from_file",
    "from_patch",
]
