"""Questions, minimal pairs and classes, item by item against other code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from torchstone.data import Tokenizer
from torchstone.evaluate import (
    Pair,
    Question,
    Scorer,
    classification,
    minimal_pairs,
    multiple_choice,
    read_examples,
    read_pairs,
    read_questions,
    wilson,
)
from torchstone.evaluate.classification import label_names

SUBJECTS = ["the cab", "a mat", "Größe", "it", "sat on the cabin"]


@torch.no_grad()
def likelihood(theirs: Any, context: list[int], ids: list[int]) -> float:
    """Sum of the log-probabilities of `ids` after `context`."""
    logits = theirs(torch.tensor([[*context, *ids[:-1]]])).logits[0].double().log_softmax(-1)
    return sum(logits[len(context) - 1 + i, token].item() for i, token in enumerate(ids))


def total(scorer: Scorer, prompt: str, text: str) -> float:
    jobs = scorer.continuation(prompt, text).jobs
    return scorer.totals(((0, job) for job in jobs), "one")[0]


@pytest.mark.parametrize(
    ("prompt", "text", "own"),
    [
        ("the", " cab", "the"),
        ("the c", "ab", "the c"),  # "cab" is a single token with its blank: the seam lies within it
        ("the ", "cab", "the"),  # blanks at the end are the choice's
        ("the a", "b", "the a"),
    ],
)
def test_a_choice_is_the_tail_of_the_whole_encoding(
    gpt2: Any, merging: Tokenizer, prompt: str, text: str, own: str
) -> None:
    whole, start = merging.encode(prompt + text), len(merging.encode(own))
    assert start > 0
    start = min(start, len(whole) - 1)
    wanted = likelihood(gpt2.theirs, whole[:start], whole[start:])
    assert total(Scorer(gpt2.ours, merging), prompt, text) == pytest.approx(wanted, rel=1e-5)


def test_the_tokenizer_of_these_tests_merges_across_a_seam(merging: Tokenizer) -> None:
    assert merging.encode("the c") + merging.encode("ab") != merging.encode("the cab")


@pytest.mark.parametrize("prompt", ["", "  "])
def test_an_empty_prompt_is_the_separator(gpt2: Any, letters: Tokenizer, prompt: str) -> None:
    wanted = likelihood(gpt2.theirs, [letters.separator], list(f"{prompt}abc".encode()))
    assert total(Scorer(gpt2.ours, letters), prompt, "abc") == pytest.approx(wanted, rel=1e-5)
    wanted = likelihood(gpt2.theirs, [7], list(f"{prompt}abc".encode()))
    assert total(Scorer(gpt2.ours, letters, start=7), prompt, "abc") == pytest.approx(wanted, rel=1e-5)


def test_a_prompt_that_is_too_long_loses_its_beginning(gpt2: Any, letters: Tokenizer) -> None:
    prompt, text = "0123456789abcdef", "xyz"
    wanted = likelihood(gpt2.theirs, list(prompt[-10:].encode()), list(text.encode()))  # 12 positions, z is not read
    scorer = Scorer(gpt2.ours, letters)
    assert scorer.continuation(prompt, text).cut == 6
    assert total(scorer, prompt, text) == pytest.approx(wanted, rel=1e-5)
    facts = multiple_choice(scorer, [Question(prompt, ["x", "y"], 0), Question("0", ["x", "y"], 0)]).facts
    assert facts == {"questions": 2, "prompts_cut": 1}


def questions() -> list[Question]:
    choices = ["ab", " cabin", "e", "xyz x", "é"]
    return [Question(prompt, choices, number % 5) for number, prompt in enumerate([*SUBJECTS, "x", "y z", "", "q"])]


def test_accuracy_counts_the_best_choice_and_the_best_a_byte(gpt2: Any, letters: Tokenizer) -> None:
    items, right, per_byte = questions(), 0, 0
    for item in items:
        scores = []
        for choice in item.choices:
            room = 12 + 1 - len(choice.encode())
            context = list(item.prompt.encode())[-room:] or [letters.separator]
            scores.append(likelihood(gpt2.theirs, context, list(choice.encode())))
        right += max(range(5), key=scores.__getitem__) == item.answer
        sizes = [score / len(choice.encode()) for score, choice in zip(scores, item.choices, strict=True)]
        per_byte += max(range(5), key=sizes.__getitem__) == item.answer
    found = multiple_choice(Scorer(gpt2.ours, letters), items)
    assert right != per_byte  # or the two could be swapped
    assert found["accuracy"] == wilson(right, 9) and found["accuracy_per_byte"] == wilson(per_byte, 9)


def test_a_choice_is_as_long_as_its_bytes_and_not_its_characters(gpt2: Any, letters: Tokenizer) -> None:
    choices, items, by_characters = ["漢字", "ab", "é", "xyz"], [], []
    for prompt in "abcdefghijklmnopqrstuvwxyz":
        scores = [likelihood(gpt2.theirs, [ord(prompt)], list(choice.encode())) for choice in choices]
        best = [
            max(range(4), key=[score / size for score, size in zip(scores, sizes, strict=True)].__getitem__)
            for sizes in ([len(choice.encode()) for choice in choices], [len(choice) for choice in choices])
        ]
        items.append(Question(prompt, choices, best[0]))
        by_characters.append(best[1])
    assert by_characters != [item.answer for item in items]
    assert multiple_choice(Scorer(gpt2.ours, letters), items)["accuracy_per_byte"].value == 1


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_batch_changes_no_score(request: pytest.FixtureRequest, letters: Tokenizer, name: str) -> None:
    model = request.getfixturevalue(name).ours
    sums = []
    for batch in (1, 7):
        scorer = Scorer(model, letters, batch=batch)
        jobs = [
            ((i, j), job)
            for i, item in enumerate(questions())
            for j, choice in enumerate(item.choices)
            for job in scorer.continuation(item.prompt[-4:], choice).jobs
        ]
        sums.append(scorer.totals(jobs, "both"))
    assert list(sums[0]) == list(sums[1])
    assert list(sums[0].values()) == pytest.approx(list(sums[1].values()), rel=1e-5)


@torch.no_grad()
def test_a_masked_model_scores_a_choice_token_by_token(bert: Any, framed: Tokenizer) -> None:
    cls, *ids, sep = framed.encode_input("the cab")
    wanted = 0.0
    for at in range(4, 7):
        row = torch.tensor([[cls, *ids[:at], framed.mask, *ids[at + 1 :], sep]])
        wanted += bert.theirs(row).logits[0, 1 + at].double().log_softmax(-1)[ids[at]].item()
    assert total(Scorer(bert.ours, framed), "the ", "cab") != pytest.approx(wanted, rel=1e-3)  # the blank counts
    at = 3
    row = torch.tensor([[cls, *ids[:at], framed.mask, *ids[at + 1 :], sep]])
    wanted += bert.theirs(row).logits[0, 1 + at].double().log_softmax(-1)[ids[at]].item()
    assert total(Scorer(bert.ours, framed), "the ", "cab") == pytest.approx(wanted, rel=1e-5)


@torch.no_grad()
def test_an_encoder_decoder_reads_the_prompt_in_its_encoder(t5: Any, letters: Tokenizer) -> None:
    scorer = Scorer(t5.ours, letters, start=0, batch=3)
    items = [Question(prompt, ["ab", "c", "xyzé"], 1) for prompt in [*SUBJECTS, ""]]
    right = 0
    for item in items:
        source = torch.tensor([list(item.prompt.encode()) or [0]])
        scores = []
        for choice in item.choices:
            ids = [0, *choice.encode()]
            logits = t5.theirs(input_ids=source, decoder_input_ids=torch.tensor([ids])).logits[0].double()
            logits = logits.log_softmax(-1)
            scores.append(sum(logits[i, token].item() for i, token in enumerate(ids[1:])))
            assert total(scorer, item.prompt, choice) == pytest.approx(scores[-1], rel=1e-4)
        right += scores.index(max(scores)) == item.answer
    assert multiple_choice(scorer, items)["accuracy"] == wilson(right, len(items))


# ------------------------------------------------------------------------------------------------- minimal pairs


def test_minimal_pairs_prefer_the_more_probable_sentence(
    gpt2: Any, letters: Tokenizer, jsonl: Callable[..., str]
) -> None:
    sentences = [("the cat", "cat the"), ("it is", "it are"), ("a b", "b a"), ("they are", "they is")]
    records = [
        {"sentence_good": good, "sentence_bad": bad, "field": "order" if i % 2 else "number", "UID": f"u{i}"}
        for i, (good, bad) in enumerate(sentences)
    ]
    same = {"sentence_good": "x", "sentence_bad": "x", "field": "number"}
    found = minimal_pairs(Scorer(gpt2.ours, letters), read_pairs(jsonl(*records, same)))
    start = [letters.separator]
    won = [
        float(likelihood(gpt2.theirs, start, list(a.encode())) > likelihood(gpt2.theirs, start, list(b.encode())))
        for a, b in sentences
    ]
    assert 0 < sum(won) < 4
    assert found["accuracy"] == wilson(sum(won) + 0.5, 5)  # a tie counts a half
    assert found.groups["field=order"] == wilson(won[1] + won[3], 2)
    assert found.groups["field=number"] == wilson(won[0] + won[2] + 0.5, 3)
    assert set(found.groups) == {"field=order", "field=number", "UID=u0", "UID=u1", "UID=u2", "UID=u3"}


@torch.no_grad()
def test_minimal_pairs_of_a_masked_model_go_by_pseudo_log_likelihood(bert: Any, framed: Tokenizer) -> None:
    def score(text: str) -> float:
        row = framed.encode_input(text)
        out = 0.0
        for at in range(1, len(row) - 1):
            hidden = torch.tensor([[*row[:at], framed.mask, *row[at + 1 :]]])
            out += bert.theirs(hidden).logits[0, at].double().log_softmax(-1)[row[at]].item()
        return out

    pairs = [Pair("the cat", "cat the"), Pair("it is", "it are"), Pair("a b", "b a"), Pair("they go", "they goes")]
    won = sum(score(pair.good) > score(pair.bad) for pair in pairs)
    assert minimal_pairs(Scorer(bert.ours, framed), pairs)["accuracy"] == wilson(won, 4)


# ------------------------------------------------------------------------------------------------ classification


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 7])
def test_classification_is_the_argmax_of_theirs(
    classifier: Any, framed: Tokenizer, jsonl: Callable[..., str], batch: int
) -> None:
    texts = [*SUBJECTS, "x", "", "0123456789abcdefghij"]
    wanted = []
    for text in texts:
        cls, *ids, sep = framed.encode_input(text)
        wanted.append(classifier.theirs(torch.tensor([[cls, *ids[:12], sep]])).logits[0].argmax().item())
    assert len(set(wanted)) > 1
    names = label_names({"id2label": {"0": "good", "1": "bad", "2": "neither"}})
    labels = [wanted[0], wanted[1], (wanted[2] + 1) % 3, *wanted[3:7], {v: k for k, v in names.items()}[wanted[7]]]
    path = jsonl(*({"text": text, "label": label} for text, label in zip(texts, labels, strict=True)))
    found = classification(Scorer(classifier.ours, framed, batch=batch), read_examples(path), names)
    assert found["accuracy"] == wilson(7, 8)
    assert found.facts == {"examples": 8, "classes": 3, "texts_cut": 2}  # "sat on the cabin" has 16 tokens too


def test_answers_are_numbers_or_texts(jsonl: Callable[..., str]) -> None:
    path = jsonl({"prompt": "1+1=", "choices": ["2", "3"], "answer": "3"}, "",
                 {"question": "1+1=", "choices": ["2", "3"], "answer": 0})  # fmt: skip
    assert [question.answer for question in read_questions(path)] == [1, 0]
    assert [question.answer for question in read_questions(path, limit=1)] == [1]
    (example,) = read_examples(jsonl({"text": "", "label": 2}))
    assert (example.text, example.label) == ("", 2)
