"""Prototypical calibration: a mixture of label probabilities, matched to labels."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

import tiny
from generate import small
from torchstone.adapt.calibration import Classifier, contextual, features, fit_mixture, match
from torchstone.adapt.label_scores import kept_scores
from torchstone.data.tokenizer import BYTE_CHARACTERS, byte_level
from torchstone.errors import TorchstoneError
from torchstone.generate import Engine
from torchstone.keys import Key

ASKED = ["--template", "{x}:{y}", "--label", "no", "--label", "yes", "--restarts", "3"]


def cloud(labels: int, texts: int = 200, apart: float = 8.0, noise: float = 0.3, seed: int = 0) -> tuple[Any, Any, Any]:
    drawn = np.random.default_rng(seed)
    label_N = drawn.integers(0, labels, texts)
    z_NC = apart * np.eye(labels)[label_N] + noise * drawn.normal(size=(texts, labels))
    return z_NC, label_N, drawn.normal(0, 2.5, labels)


@pytest.fixture(scope="module")
def engine() -> Engine:
    tokenizer = byte_level({character: i for i, character in enumerate(BYTE_CHARACTERS)})
    return Engine(small.build(vocabulary=tokenizer.vocabulary), tokenizer, compile="off")


@pytest.mark.parametrize("labels", [2, 3, 4, 5])
def test_best_and_second_matching_are_those_of_all_permutations(labels: int) -> None:
    mean_CC = np.random.default_rng(labels).normal(size=(labels, labels))
    profits = sorted(sum(mean_CC[n, k[n]] for n in range(labels)) for k in permutations(range(labels)))
    found = match(mean_CC)
    assert found.profit == pytest.approx(profits[-1]) and found.margin == pytest.approx(profits[-1] - profits[-2])


@pytest.mark.parametrize("labels", [2, 4])
def test_clusters_far_apart_are_told_apart_whatever_the_bias(labels: int) -> None:
    z_NC, label_N, bias_C = cloud(labels)
    for feature in ("log", "clr"):
        v_NC = features(z_NC + bias_C, feature)
        assert (fit_mixture(v_NC, Key(0), restarts=20).posteriors(v_NC).argmax(1) == label_N).all()
    assert ((z_NC + 3 * bias_C).argmax(1) != label_N).any()


@pytest.mark.parametrize("select", ["profit", "likelihood"])
def test_a_bias_does_not_move_the_posteriors_of_clr(select: Any) -> None:
    z_NC, _, bias_C = cloud(3, apart=2.0, noise=1.0)
    first, second = (
        fit_mixture(v_NC, Key(1), restarts=8, select=select).posteriors(v_NC)
        for v_NC in (features(z_NC, "clr"), features(z_NC + bias_C, "clr"))
    )
    np.testing.assert_allclose(first, second, atol=1e-6)
    turned_NC = features(z_NC[:, [2, 0, 1]], "clr")
    again = fit_mixture(turned_NC, Key(1), restarts=8, select=select).posteriors(turned_NC)
    np.testing.assert_allclose(again, first[:, [2, 0, 1]], atol=1e-6)


def test_posteriors_are_bayes_with_labels_equally_frequent() -> None:
    z_NC, label_N, _ = cloud(3, apart=2.0, noise=1.0)
    v_NC = features(z_NC[(label_N != 0) | (np.arange(len(z_NC)) % 3 == 0)])  # a label that is rare
    found = fit_mixture(v_NC, Key(0), restarts=8)
    assert found.weight_C.max() - found.weight_C.min() > 0.05
    density_NC = np.stack([multivariate_normal(m, s).pdf(v_NC)
                           for m, s in zip(found.mean_CC, found.covariance_CCC, strict=True)], 1)  # fmt: skip
    expected_NC = np.empty_like(density_NC)
    for component, label in enumerate(found.matching.label_C):
        expected_NC[:, label] = density_NC[:, component] / density_NC.sum(1)
    np.testing.assert_allclose(found.posteriors(v_NC), expected_NC, atol=1e-9)
    np.testing.assert_allclose(found.posteriors(v_NC).sum(1), 1)


def test_the_largest_profit_of_the_starts_is_taken_and_more_starts_keep_it() -> None:
    v_NC = features(cloud(4, apart=2.0, noise=1.0)[0])
    few, more, again = (fit_mixture(v_NC, Key(3), restarts=n) for n in (3, 9, 9))
    assert few.kept == 3 and more.kept == 9
    assert few.profits == more.profits[:3] and few.matching.profit == max(few.profits)
    assert more.matching.profit == max(more.profits) == more.profits[more.restart]
    assert more.profits == again.profits and (more.mean_CC == again.mean_CC).all()
    assert len(set(more.profits)) > 1


def test_contextual_calibration_divides_by_what_no_content_gives() -> None:
    logprobs, free = np.log([[0.6, 0.4], [0.9, 0.1]]), np.log([[0.8, 0.2], [0.7, 0.3]])
    wanted = np.array([[0.6 / 0.75, 0.4 / 0.25], [0.9 / 0.75, 0.1 / 0.25]])
    np.testing.assert_allclose(contextual(logprobs, free), wanted / wanted.sum(1, keepdims=True))


def test_a_probability_of_zero_is_as_small_as_can_be() -> None:
    assert features(np.array([[0.0, -np.inf]])).tolist() == [[0.0, np.log(1e-12)]]


def test_scores_are_those_of_the_first_token_or_of_the_word(engine: Engine) -> None:
    template, shown = "{x}:{y}", [("ab", "no"), ("cd", "yes")]
    by = {words: Classifier(engine, template, ["no", "yes"], demonstrations=shown, between="|", words=words).scores(
        ["ef", "g"]) for words in ("first", "all")}  # fmt: skip
    assert engine.tokenizer is not None
    for n, text in enumerate(["ef", "g"]):
        for c, word in enumerate(["no", "yes"]):
            prompt, own = engine.tokenizer.encode(f"ab:no|cd:yes|{text}:"), engine.tokenizer.encode(word)
            with torch.no_grad():
                logprobs = engine.model(torch.tensor([[*prompt, *own]])).logits[0].log_softmax(-1)
            each = [float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(own)]
            assert by["first"][n, c] == pytest.approx(each[0], abs=1e-4)
            assert by["all"][n, c] == pytest.approx(sum(each) / len(each), abs=1e-4)


def test_a_classifier_fits_and_predicts(engine: Engine) -> None:
    texts = [f"{a}{b}" for a in "abcdef" for b in "ghij"]
    for calibration in ("none", "contextual", "prototypical"):
        made = Classifier(engine, "{x}:{y}", ["no", "yes"], calibration=calibration, restarts=4)
        if calibration != "none":
            with pytest.raises(TorchstoneError, match=f"{calibration} is not fitted yet; call fit first"):
                made.predict(texts)
        probability_NC = made.fit(texts).probabilities(texts)
        assert made.predict(texts) == [["no", "yes"][c] for c in probability_NC.argmax(1)]
        np.testing.assert_allclose(probability_NC.sum(1), 1)


def test_a_doubtful_estimate_is_said(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    made = Classifier(engine, "{x}:{y}", ["no", "yes"], restarts=2)
    made.fit_scores(np.zeros((30, 2)))
    said = capsys.readouterr().err
    assert "labels may be mixed up" in said or "a component holds less than 1/10" in said
    made.fit_scores(cloud(2)[0])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "{x} is"}, "template: needs {x} once and {y} once after it"),
        ({"labels": ["no"]}, "labels: two or more different words"),
        ({"labels": ["no", "not"]}, "'no' and 'not' begin with the same token"),
        ({"demonstrations": [("a", "maybe")]}, "label 'maybe' is none of 'no', 'yes'"),
        ({"demonstrations": [("a" * 70, "no")]}, "tokens with the demonstrations, and the model's window has 64"),
        ({"feature": "raw"}, "feature: one of log, clr, not 'raw'"),
        ({"restarts": 0}, "restarts: is 0"),
        ({"regularisation": 0.0}, "regularisation: needs a positive number"),
        ({"calibration": "contextual", "content_free": ()}, "needs an input without content"),
    ],
)
def test_what_cannot_work_is_refused(engine: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TorchstoneError) as said:
        Classifier(engine, **{"template": "{x}:{y}", "labels": ["no", "yes"], **options})
    assert message in str(said.value)


def test_too_few_texts_are_refused(engine: Engine) -> None:
    with pytest.raises(TorchstoneError, match="1 texts to estimate 2 components from"):
        Classifier(engine, "{x}:{y}", ["no", "yes"]).fit(["a"])
    with pytest.raises(TorchstoneError, match="not all finite"):
        fit_mixture(np.full((9, 2), np.nan), Key(0))


def test_the_verb(tmp_path: Path, cli: Any) -> None:
    tiny.saved(tmp_path / "run", tiny.recipe(tmp_path, data={"block": 32}))
    rows = [{"text": text, "label": "no" if n % 2 else "yes"} for n, text in enumerate("abcdefgh")]
    (tmp_path / "file.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = ["adapt", "classify", tmp_path / "run", tmp_path / "file.jsonl", "--template", "{x}:{y}"]
    words = ["--label", "no", "--label", "yes"]
    said = cli(*base, *words, "--restarts", "3", "--estimate", "6", "--json")
    assert said.status == 0, said.err
    report = json.loads(said.out)
    found = [row["label"] for row in report["predictions"]]
    right = sum(word == row["label"] for word, row in zip(found, rows, strict=True))
    assert report["accuracy"] == right / 8 and set(found) <= {"no", "yes"}
    assert "accuracy" in cli(*base, *words, "--calibration", "contextual").out
    said = cli(*base, "--label", "no", "--label", "maybe")
    assert said.status and "label 'yes' is none of no, maybe" in said.err


def test_the_verb_reads_tables(tmp_path: Path, cli: Any) -> None:
    tiny.saved(tmp_path / "run", tiny.recipe(tmp_path, data={"block": 32}))
    rows = [(text, "no" if n % 2 else "yes") for n, text in enumerate("abcdefgh")]
    for name, some in (("file", rows), ("shown", rows[:2]), ("more", rows[2:])):
        lines = [json.dumps({"text": text, "label": label}) for text, label in some]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        (tmp_path / f"{name}.tsv").write_text("".join("\t".join(row) + "\n" for row in [("text", "label"), *some]))
    said = []
    for ending in ("jsonl", "tsv"):
        given = ["--demonstrations", tmp_path / f"shown.{ending}", "--unlabelled", tmp_path / f"more.{ending}"]
        said.append(cli("adapt", "classify", tmp_path / "run", tmp_path / f"file.{ending}", *ASKED, *given))
        assert said[-1].status == 0, said[-1].err
    assert said[0].out == said[1].out and "accuracy" in said[1].out
    (tmp_path / "file.tsv").write_text("words\tlabel\na\tyes\n")
    refused = cli("adapt", "classify", tmp_path / "run", tmp_path / "file.tsv", *ASKED)
    assert refused.status == 2 and "file.tsv' line 2: no field 'text'; fields: words, label" in refused.err


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that a model scores, as they come."""
    found: list[str] = []
    scores = Classifier.scores
    monkeypatch.setattr(Classifier, "scores", lambda self, texts: (found.extend(texts), scores(self, texts))[1])
    return found


def test_texts_in_a_file_of_scores_are_not_scored_again(tmp_path: Path, cli: Any, scored: list[str]) -> None:
    tiny.saved(tmp_path / "run", tiny.recipe(tmp_path, data={"block": 32}))
    for name, texts in (("file", "abcdab"), ("more", "cdefg")):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    kept, base = tmp_path / "kept.jsonl", ["adapt", "classify", tmp_path / "run", tmp_path / "file", *ASKED]
    plain = cli(*base, "--json")
    assert plain.status == 0 and scored == list("abcdab")
    scored.clear()
    assert cli(*base, "--json", "--scores", kept).out == plain.out and scored == list("abcd")
    first, *rows = map(json.loads, kept.read_text().splitlines())
    assert first["template"] == "{x}:{y}" and len(first["weights"]) == 64
    assert [row["text"] for row in rows] == list("abcd") and all(len(row["scores"]) == 2 for row in rows)
    scored.clear()
    unlabelled = ["--unlabelled", tmp_path / "more"]
    wanted = cli(*base, *unlabelled).out
    scored.clear()
    assert cli(*base, *unlabelled, "--scores", kept).out == wanted and scored == list("efg")
    before, time = kept.read_bytes(), kept.stat().st_mtime_ns
    scored.clear()
    assert cli(*base, *unlabelled, "--scores", kept, "--calibration", "none").status == 0 and not scored
    assert kept.read_bytes() == before and kept.stat().st_mtime_ns == time
    assert len(before.splitlines()) == 8


def test_scores_of_something_else_are_refused_and_stay(tmp_path: Path, engine: Engine, scored: list[str]) -> None:
    kept, texts = tmp_path / "kept.jsonl", ["ab", "cd"]
    given: dict[str, Any] = {"template": "{x}:{y}", "labels": ["no", "yes"], "demonstrations": [("e", "no")]}
    found_NC = kept_scores(Classifier(engine, **given), texts, kept)
    before = kept.read_bytes()
    assert (kept_scores(Classifier(engine, **given), texts[::-1], kept) == found_NC[::-1]).all()
    scored.clear()
    other = Engine(small.build(vocabulary=engine.tokenizer.vocabulary), engine.tokenizer, compile="off")  # type: ignore[union-attr]
    with torch.no_grad():
        next(other.model.parameters())[0, 0] += 1
    for said, source, change in (
        ("weights", other, {}),
        ("template", engine, {"template": "{x};{y}"}),
        ("labels", engine, {"labels": ["yes", "no"]}),
        ("demonstrations", engine, {"demonstrations": []}),
        ("between", engine, {"between": "|"}),
        ("template and words", engine, {"template": "{x} {y}", "words": "all"}),
    ):
        with pytest.raises(TorchstoneError, match=f"line 1: its scores were made with other {said}; choose another"):
            kept_scores(Classifier(source, **{**given, **change}), ["ef"], kept)
    with pytest.raises(TorchstoneError, match="tokens with the demonstrations, and the model's window has 64"):
        kept_scores(Classifier(engine, **given), ["ef", "x" * 70], kept)
    assert kept.read_bytes() == before and [*map(len, scored)] == [2, 70]
    assert [path.name for path in tmp_path.iterdir()] == ["kept.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1:], "line 1: no file of label scores, weights is not said"),
        (lambda rows: [*rows, {"text": "q", "scores": [1.0]}], "line 3: field 'scores' needs a finite number for each"),
        (lambda rows: [*rows, {"text": "q", "scores": [1.0, None]}], "line 3: field 'scores' needs a finite number"),
        (lambda rows: [*rows, {"text": 3, "scores": [1.0, 2.0]}], "line 3: field 'text' is int"),
        (lambda rows: [], "holds no record"),
    ],
)
def test_a_file_that_holds_no_scores_is_refused(tmp_path: Path, engine: Engine, change: Any, message: str) -> None:
    kept, made = tmp_path / "kept.jsonl", Classifier(engine, "{x}:{y}", ["no", "yes"])
    kept_scores(made, ["ab"], kept)
    rows = change([json.loads(line) for line in kept.read_text().splitlines()])
    kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TorchstoneError) as said:
        kept_scores(made, ["ab"], kept)
    assert message in str(said.value)


@pytest.mark.parametrize(("name", "message"), [("a/b.jsonl", "scores: no folder"), ("b.tsv", "would hold JSON lines")])
def test_a_file_of_scores_that_cannot_be_made_is_refused_first(
    tmp_path: Path, engine: Engine, scored: list[str], name: str, message: str
) -> None:
    with pytest.raises(TorchstoneError, match=message):
        kept_scores(Classifier(engine, "{x}:{y}", ["no", "yes"]), ["ab"], tmp_path / name)
    assert not scored and not list(tmp_path.iterdir())
