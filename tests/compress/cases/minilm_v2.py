"""MiniLMv2 in what is asked of all objectives."""

import tiny

GOLDEN = {"objective": {"teacher": "another", "relation_heads": 4}}
GRADIENT = tiny.distilled, {"model": {**tiny.MODEL, "depth": 2}, "objective": {"relations": ["qq", "kv", "vv"]}}
EXEMPT = {
    "nan": "a student of relations has no targets",
    "no_targets": "of every token it is asked how it relates to others",
}
