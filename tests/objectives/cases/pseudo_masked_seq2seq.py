"""Sequence-to-sequence tuning with pseudo masks in what is asked of all objectives."""

import tiny

GOLDEN = {"model": {"causal": False, "head": {"kind": "mlm"}, "position": "t5"}}
GRADIENT = tiny.recipe, {**tiny.MASKED, "objective": {"kind": "pseudo_masked_seq2seq"}}
