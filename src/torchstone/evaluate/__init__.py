"""Evaluation: perplexity and bits per byte of texts, accuracy on questions, classes and minimal pairs, with intervals.

`Scorer` gives log-likelihoods of tokens under a model; the tasks are functions of a scorer and items; `evaluate` does
several tasks on a run. `torchstone.evaluate.harness` is for the tasks of lm-evaluation-harness.
"""

from __future__ import annotations

from torchstone.evaluate.attention_resolution import attention_resolution, score_curve
from torchstone.evaluate.classification import Example, classification, read_examples
from torchstone.evaluate.evaluation import Sources, evaluate, report
from torchstone.evaluate.infilling import Hole, infilling, read_holes
from torchstone.evaluate.intervals import Estimate, ratio, wilson
from torchstone.evaluate.lengths import bits_by_length
from torchstone.evaluate.minimal_pairs import Pair, minimal_pairs, read_pairs
from torchstone.evaluate.multiple_choice import Question, multiple_choice, read_questions
from torchstone.evaluate.progress import Progress
from torchstone.evaluate.result import Result
from torchstone.evaluate.routing import expert_choices, representation_collapse, routing_fluctuation
from torchstone.evaluate.scoring import Scorer
from torchstone.evaluate.text import perplexity, read_documents

__all__ = [
    "Estimate",
    "Example",
    "Hole",
    "Pair",
    "Progress",
    "Question",
    "Result",
    "Scorer",
    "Sources",
    "attention_resolution",
    "bits_by_length",
    "classification",
    "evaluate",
    "expert_choices",
    "infilling",
    "minimal_pairs",
    "multiple_choice",
    "perplexity",
    "ratio",
    "read_documents",
    "read_examples",
    "read_holes",
    "read_pairs",
    "read_questions",
    "report",
    "representation_collapse",
    "routing_fluctuation",
    "score_curve",
    "wilson",
]
