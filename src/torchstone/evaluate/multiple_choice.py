"""Multiple choice: which continuation of a prompt a model finds most probable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchstone.errors import TorchstoneError, nearest
from torchstone.evaluate.intervals import wilson
from torchstone.evaluate.records import Record, read_records
from torchstone.evaluate.result import Result
from torchstone.evaluate.scoring import Scorer

__all__ = ["Question", "multiple_choice", "read_questions"]


@dataclass(frozen=True)
class Question:
    """A prompt, its continuations, the index of the right one, and where it stands for messages."""

    prompt: str
    choices: Sequence[str]
    answer: int
    where: str = "question"


def read_questions(path: str, limit: int | None = None) -> list[Question]:
    """Questions of a JSON-lines file: ``{"prompt": str, "choices": [str, ...], "answer": index or text}``.
    The prompt may be called "question".

    Raises:
        TorchstoneError: the file cannot be read, or a record is none; names the line.
    """
    return [_question(record) for record in read_records(path, limit)]


def _question(record: Record) -> Question:
    prompt, choices = record.text("prompt", "question"), record.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        found = f"{len(choices)}" if isinstance(choices, list) else type(choices).__name__
        raise TorchstoneError(f"{record.where}: field 'choices' needs a list of two or more strings, found {found}")
    for number, choice in enumerate(choices):
        if not isinstance(choice, str):
            raise TorchstoneError(f"{record.where}: choice {number} is {type(choice).__name__}, a string is needed")
        if not choice:
            raise TorchstoneError(f"{record.where}: choice {number} is empty; every choice needs text")
    return Question(prompt, choices, _answer(record, choices), record.where)


def _answer(record: Record, choices: Sequence[str]) -> int:
    answer = record.get("answer")
    if isinstance(answer, str):
        if answer not in choices:
            raise TorchstoneError(f"{record.where}: answer {answer!r} is none of the choices{nearest(answer, choices)}")
        return choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise TorchstoneError(f"{record.where}: answer is {type(answer).__name__}, an index or a choice is needed")
    if not 0 <= answer < len(choices):
        raise TorchstoneError(f"{record.where}: answer {answer} is out of range; choices are 0 to {len(choices) - 1}")
    return answer


def multiple_choice(scorer: Scorer, questions: Sequence[Question], source: str = "questions") -> Result:
    """Accuracy of the choice with the highest log-likelihood after the prompt, and of that with the highest
    log-likelihood a byte of the choice (`accuracy_per_byte`). Of equals the first counts.

    Prompt and choice are joined as they stand: a space between them has to be in one of the two.

    Raises:
        TorchstoneError: a choice that alone is longer than the model's positions.
    """
    jobs, cut = [], 0
    for number, question in enumerate(questions):
        parts = [scorer.continuation(question.prompt, choice, question.where) for choice in question.choices]
        cut += any(part.cut for part in parts)
        jobs += [((number, which), job) for which, part in enumerate(parts) for job in part.jobs]
    totals = scorer.totals(jobs, source, len(jobs))
    right = right_per_byte = 0
    for number, question in enumerate(questions):
        scores = [totals[number, which] for which in range(len(question.choices))]
        per_byte = [score / len(choice.encode()) for score, choice in zip(scores, question.choices, strict=True)]
        right += scores.index(max(scores)) == question.answer
        right_per_byte += per_byte.index(max(per_byte)) == question.answer
    n = len(questions)
    metrics = {"accuracy": wilson(right, n), "accuracy_per_byte": wilson(right_per_byte, n)}
    return Result("multiple_choice", source, metrics, {"questions": n, "prompts_cut": cut})
