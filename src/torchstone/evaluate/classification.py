"""Classification: the most probable class of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchstone.errors import TorchstoneError, nearest
from torchstone.evaluate.intervals import wilson
from torchstone.evaluate.records import Record, read_records
from torchstone.evaluate.result import Result
from torchstone.evaluate.scoring import Scorer
from torchstone.model.head.classification import ClassificationSpec

__all__ = ["Example", "classification", "label_names", "read_examples"]


@dataclass(frozen=True)
class Example:
    """A text, its class by number or name, and where it stands for messages."""

    text: str
    label: int | str
    where: str = "example"


def read_examples(path: str, limit: int | None = None) -> list[Example]:
    """Examples of a JSON-lines file: ``{"text": str, "label": number or name}``.

    Raises:
        TorchstoneError: the file cannot be read, or a record is none; names the line.
    """
    return [_example(record) for record in read_records(path, limit)]


def _example(record: Record) -> Example:
    text, label = record.text("text"), record.get("label")
    if not isinstance(label, int | str) or isinstance(label, bool):
        raise TorchstoneError(f"{record.where}: label is {type(label).__name__}, a number or a name is needed")
    return Example(text, label, record.where)


def label_names(config: Mapping[str, Any]) -> dict[str, int]:
    """The numbers of the classes that a config.json names in `id2label`; empty if it names none."""
    names = config.get("id2label")
    if not isinstance(names, Mapping):
        return {}
    return {str(name): int(number) for number, name in names.items() if str(number).isdecimal()}


def classification(
    scorer: Scorer, examples: Sequence[Example], names: Mapping[str, int] | None = None, source: str = "examples"
) -> Result:
    """Accuracy of the most probable class. A text that is too long loses its end.

    Args:
        scorer: of a model with a head of classification.
        examples: what to classify.
        names: numbers of the classes that have a name.
        source: name of the examples in the result.

    Raises:
        TorchstoneError: the model has no such head, or a label is none of its classes.
    """
    head = scorer.model.spec.head
    if not isinstance(head, ClassificationSpec):
        raise TorchstoneError(f"evaluate: classification needs a head of that kind, the model's is {head.kind}")
    if head.classes < 2:
        raise TorchstoneError("evaluate: the model's head has one class, which is a regression and has no accuracy")
    labels = [_number(example, head.classes, names or {}) for example in examples]
    rows, cut = [], 0
    before, after = scorer.frame
    room = None if scorer.model.limit is None else max(0, scorer.model.limit - len(before) - len(after))
    for example in examples:
        ids = scorer.tokenizer.encode(example.text)
        cut += room is not None and len(ids) > room
        row = [*before, *ids[:room], *after]
        if not row:
            raise TorchstoneError(f"{example.where}: the text has no token")
        rows.append(row)
    found = scorer.classify(rows, source)
    right = sum(a == b for a, b in zip(found, labels, strict=True))
    facts = {"examples": len(labels), "classes": head.classes, "texts_cut": cut}
    return Result("classification", source, {"accuracy": wilson(right, len(labels))}, facts)


def _number(example: Example, classes: int, names: Mapping[str, int]) -> int:
    label = example.label
    if isinstance(label, str):
        if label not in names:
            known = f"names: {', '.join(names)}" if names else "the run's config.json names none (id2label)"
            raise TorchstoneError(f"{example.where}: no class named {label!r}{nearest(label, names)}; {known}")
        label = names[label]
    if not 0 <= label < classes:
        raise TorchstoneError(f"{example.where}: label {label} is out of range; classes are 0 to {classes - 1}")
    return label
