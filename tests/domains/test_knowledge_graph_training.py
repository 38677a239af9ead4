"""Link prediction: loss and ranks by hand, one gradient however a batch is cut, runs that resume and are asked."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import knowledge
import numpy as np
import pytest
import torch

import tiny
import torchstone
from distributed import run_ranks
from torchstone.domains import knowledge_graph
from torchstone.domains.knowledge_graph.objectives.link_prediction import (
    LinkPrediction,
    LinkPredictionSpec,
    filtered_ranks,
)
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.objectives import Batch
from torchstone.recipe import dump_yaml, load_recipe
from torchstone.train import training
from torchstone.train.engine import Trainer
from torchstone.train.memory import training_memory
from torchstone.train.mesh import Mesh
from torchstone.train.run import RunFolder
from torchstone.train.training import train

Gradients = dict[str, torch.Tensor]


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(training, "plot_curve", lambda *arguments: None)
    yield


def trainer_of(folder: Path, **sections: Any) -> Trainer:
    mesh = sections.pop("mesh", None)
    return tiny.trainer(knowledge.recipe(folder, **sections), torch.float64, **({"mesh": mesh} if mesh else {}))


# ----------------------------------------------------------------------------------------------------- loss and ranks


def table(seed: int = 0) -> Callable[..., torch.Tensor]:
    """A scorer of 7 entities and 3 relations that looks its scores up: by (head, relation, tail)."""
    score_HRT = torch.randn(7, 3, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def model(given: Any, relation: Any, by_head: Any, candidate: Any = None) -> torch.Tensor:
        candidate = torch.arange(7).expand(len(given), 7) if candidate is None else candidate
        given, relation, by_head = given[:, None], relation[:, None], by_head[:, None]
        return score_HRT[torch.where(by_head, candidate, given), relation, torch.where(by_head, given, candidate)]

    model.entity = torch.randn(7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # type: ignore[attr-defined]
    model.score = score_HRT  # type: ignore[attr-defined]
    return model


def rows() -> Batch:
    generator = torch.Generator().manual_seed(2)
    return {
        "head": torch.tensor([0, 1, 2, 3]),
        "relation": torch.tensor([2, 1, 0, 2]),
        "tail": torch.tensor([4, 4, 5, 6]),
        "seeks_head": torch.tensor([False, True, True, False]),
        "negative": torch.randint(0, 7, (4, 3), generator=generator),
        "weight": torch.tensor([1.0, 2.0, 3.5, 1.0], dtype=torch.float64),
    }


@pytest.mark.parametrize("temperature", [0.0, 1.7])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_that_of_the_paper(temperature: float, weighted: bool) -> None:
    model: Any = table()
    objective = LinkPrediction(LinkPredictionSpec(temperature=temperature, weighted=weighted, regulariser=0.3))
    batch = rows()
    result, counts = objective(model, batch, None), objective.counts(batch)
    found = sum(term.weight * term.total / counts[term.over] for term in result.terms.values())
    loss = weights = 0.0
    for n in range(4):
        h, r, t = (int(batch[name][n]) for name in ("head", "relation", "tail"))
        s = model.score.numpy()
        negatives = [s[e, r, t] if batch["seeks_head"][n] else s[h, r, e] for e in batch["negative"][n].tolist()]
        p = np.exp(temperature * np.array(negatives))
        p /= p.sum()
        each = -np.log1p(np.exp(-s[h, r, t])) - sum(q * np.log1p(np.exp(x)) for q, x in zip(p, negatives, strict=True))
        w = float(batch["weight"][n]) if weighted else 1.0
        loss, weights = loss - w * each / 2, weights + w
    wanted = loss / weights + 0.3 * np.sqrt((model.entity.numpy() ** 2).sum(1)).mean()
    assert float(found) == pytest.approx(wanted, rel=1e-12)


def test_negatives_weigh_by_numbers_that_have_no_gradient() -> None:
    scores = torch.tensor([[0.3, 2.0, -1.0]], dtype=torch.float64, requires_grad=True)
    batch = {**{name: value[:1] for name, value in rows().items()}, "negative": torch.tensor([[1, 2]])}
    objective = LinkPrediction(LinkPredictionSpec(temperature=1.3))
    term = objective(lambda *inputs: scores, batch, None).terms["loss"]  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(term.weight * term.total, scores)
    p = np.exp(1.3 * np.array([2.0, -1.0]))
    p /= p.sum()
    sigmoid = 1 / (1 + np.exp(-np.array([2.0, -1.0])))
    np.testing.assert_allclose(grad[0], [-0.5 * (1 - 1 / (1 + np.exp(-0.3))), *(0.5 * p * sigmoid)], rtol=1e-12)


def test_ranks_are_those_of_counting_with_ties_in_the_middle() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (200, 9), generator=generator).double()  # many ties
    known = torch.rand(200, 9, generator=generator) < 0.3
    answer = torch.randint(0, 9, (200,), generator=generator)
    known[torch.arange(200), answer] = False
    wanted = [
        knowledge.rank(scores[n].tolist(), int(answer[n]), set(known[n].nonzero()[:, 0].tolist())) for n in range(200)
    ]
    assert filtered_ranks(scores, answer, known).tolist() == wanted and len(set(wanted)) > 10
    wider = torch.cat([scores, torch.full((200, 3), 9.0)], 1)  # a model that knows entities beyond the data's
    assert filtered_ranks(wider, answer, known).tolist() == wanted


def test_a_scorer_that_knows_nothing_is_in_the_middle_and_no_number_is_last() -> None:
    known = torch.tensor([[False, True, False, False, True]])
    assert filtered_ranks(torch.zeros(1, 5), torch.tensor([2]), known).tolist() == [2.0]
    scores = torch.tensor([[1.0, 5.0, torch.nan, 0.0, 7.0]])
    assert filtered_ranks(scores, torch.tensor([2]), known).tolist() == [3.0]
    assert filtered_ranks(torch.full((1, 5), -torch.inf), torch.tensor([2]), known).tolist() == [2.0]


def test_evaluation_reports_filtered_ranks_from_both_ends(tmp_path: Path) -> None:
    """By a loop over facts, entities and files that the library has no part in but for the scores."""
    trainer = trainer_of(tmp_path)
    graph, data = tmp_path / "graph", load_recipe(knowledge.recipe(tmp_path)).data.prepare()
    e = {name: n for n, name in enumerate(data.names["entities"])}
    r = {name: n for n, name in enumerate(data.names["relations"])}
    facts = {fact for split in ("train", "valid", "test") for fact in knowledge.facts(graph, split)}

    every_E = torch.arange(14)

    @torch.no_grad()
    def scores(h: torch.Tensor, p: str, t: torch.Tensor) -> list[float]:
        """By their tails, whichever end there are several of."""
        where = torch.full((14,), r[p]), torch.zeros(14, dtype=torch.bool)
        return trainer.model(h.expand(14), *where, t.expand(14)[:, None])[:, 0].tolist()

    ranks = []
    for h, p, t in knowledge.facts(graph, "test"):
        by_tail = scores(torch.tensor(e[h]), p, every_E)
        ranks.append(knowledge.rank(by_tail, e[t], {e[x] for x in e if (h, p, x) in facts and x != t}))
        by_head = scores(every_E, p, torch.tensor(e[t]))
        ranks.append(knowledge.rank(by_head, e[h], {e[x] for x in e if (x, p, t) in facts and x != h}))
    row = trainer.measure_split(data.test, "test")
    assert row["test_mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]), rel=1e-6)
    for most in (1, 3, 10):
        assert row[f"test_hits@{most}"] == pytest.approx(np.mean([rank <= most for rank in ranks]))
    assert 0 < row["test_hits@3"] < row["test_hits@10"]


# ------------------------------------------------------------------------------------------------------- one gradient


def gradients(trainer: Trainer, batches: list[Batch]) -> tuple[Gradients, float]:
    trainer.optim.zero_grad()
    loss = trainer.gradients(batches, 0)["loss"]
    return {p.name: p.value.grad.clone() for p in trainer.named if p.value.grad is not None}, loss


def batch_of(trainer: Trainer) -> Batch:
    """Six rows, ends mixed, weights from 1 to 6."""
    made = trainer.source.train.batch(Key(3), 0, 6)
    return {**made, "seeks_head": torch.arange(6) % 2 == 1, "weight": torch.arange(1.0, 7.0, dtype=torch.float64)}


def pieces(batch: Batch, *sizes: int) -> list[Batch]:
    split = {name: value.split(sizes) for name, value in batch.items()}
    return [{name: parts[n] for name, parts in split.items()} for n in range(len(sizes))]


def assert_same(found: tuple[Gradients, float], wanted: tuple[Gradients, float]) -> None:
    assert (
        found[0].keys() == wanted[0].keys() == {"entity", "rotation", "projection", "strength", "scale", "translation"}
    )
    for name, value in wanted[0].items():
        assert value.any(), name
        torch.testing.assert_close(found[0][name], value, rtol=1e-9, atol=1e-12)
    assert found[1] == pytest.approx(wanted[1], rel=1e-12)


@pytest.mark.parametrize("sizes", [(1, 5), (2, 1, 3), (1, 1, 1, 1, 1, 1)], ids=str)
def test_one_batch_equals_unequal_micro_batches(sizes: tuple[int, ...], tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    batch = batch_of(trainer)
    assert_same(gradients(trainer, pieces(batch, *sizes)), gradients(trainer, [batch]))


def of_two_ranks(mesh: Mesh, folder: Path) -> dict[str, Any]:
    trainer = trainer_of(folder, mesh=mesh)
    found: dict[str, Any] = {"gradients": gradients(trainer, [pieces(batch_of(trainer), 1, 5)[mesh.rank]])}
    found["valid"] = trainer.measure_split(trainer.source.valid, "valid")
    trained = trainer_of(folder, mesh=mesh)
    found["trained"] = [trained.train_step()["loss"] for _ in range(4)]
    return found


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    assert trainer.source.valid is not None
    whole, valid = gradients(trainer, [batch_of(trainer)]), trainer.measure_split(trainer.source.valid, "valid")
    twice = trainer_of(tmp_path, trainer={"accumulate": 2})
    losses = [twice.train_step()["loss"] for _ in range(4)]
    for rank in run_ranks(of_two_ranks, 2, tmp_path):
        assert_same(rank["gradients"], whole)
        assert rank["valid"] == pytest.approx(valid, rel=1e-6)  # ranks are float32
        assert rank["trained"] == pytest.approx(losses, rel=1e-10)


# --------------------------------------------------------------------------------------------------------------- runs


def test_cut_and_resumed_equals_uncut_bit_for_bit(tmp_path: Path, no_plots: None) -> None:
    hard = knowledge.recipe(tmp_path, trainer={"accumulate": 2, "ema": 0.9})
    whole = train(hard, out=tmp_path / "whole", quiet=True)
    with tiny.cut_after(5):
        train(hard, out=tmp_path / "cut", quiet=True)
    tiny.assert_same_run(train(hard, out=tmp_path / "cut", resume=True, quiet=True), whole)
    last = whole.metrics()[-1]
    assert {"test_loss", "test_mrr", "test_hits@1", "test_hits@3", "test_hits@10"} <= last.keys()
    other = knowledge.recipe(tmp_path, trainer={"accumulate": 2, "ema": 0.9})
    knowledge.write(tmp_path / "graph" / "test.txt", [("p0", "plus1", "p2")])
    with pytest.raises(TorchstoneError, match="the corpus changed since the run began"):
        train(other, out=tmp_path / "cut", resume=True, quiet=True)


@pytest.mark.parametrize("name", ["transe", "rotate", "house_r", "house"])
def test_every_model_learns_the_facts_that_it_is_trained_on(name: str, tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path,
        model={**knowledge.MODELS[name], "gamma": 6.0},
        optimizer={"lr": 0.05},
        trainer={"steps": 60, "batch": 16},
    )
    before = trainer.measure_split(trainer.source.train, "train")
    for _ in range(60):
        trainer.train_step()
    after = trainer.measure_split(trainer.source.train, "train")
    assert after["train_loss"] < before["train_loss"] and after["train_mrr"] > before["train_mrr"] + 0.1


def test_strengths_stay_below_their_bound_in_training(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, model={**knowledge.MODELS["house"], "max_strength": 0.02}, optimizer={"lr": 0.1})
    model: Any = trainer.model
    for _ in range(6):
        trainer.train_step()
        assert model.strengths().max() <= 0.02
    assert (model.strength * model.scale.abs()).max() > 0.02  # the bound was met


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run, moved away from its graph, which is gone."""
    folder = tmp_path_factory.mktemp("asked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "plot_curve", lambda *arguments: None)
        train(knowledge.recipe(folder), out=folder / "run", quiet=True)
    shutil.copytree(folder / "run", folder / "moved")
    shutil.rmtree(folder / "run")
    shutil.rmtree(folder / "graph")
    return RunFolder(folder / "moved")


def test_a_run_is_asked_by_names_without_its_graph(run: RunFolder) -> None:
    graph = knowledge_graph.load(run.path)
    tails = graph.predict(head="p3", relation="plus2", top=None)
    assert {answer.name for answer in tails} == {f"p{n}" for n in range(14)}
    assert [a.score for a in tails] == sorted((a.score for a in tails), reverse=True)
    entity, relation = graph.entities.number, graph.relations.number
    for answer in tails:
        one = torch.tensor([entity("p3")]), torch.tensor([relation("plus2")]), torch.tensor([False])
        assert answer.score == pytest.approx(graph.model(*one, torch.tensor([[entity(answer.name)]])).item(), abs=1e-5)
    heads = {answer.name: answer.score for answer in graph.predict(tail="p5", relation="plus2", top=None)}
    assert heads["p3"] == pytest.approx(next(a.score for a in tails if a.name == "p5"), abs=1e-5)
    assert [a.name for a in graph.predict(head="p3", relation="plus2", top=2)] == [a.name for a in tails[:2]]


def test_questions_without_sense_are_refused(run: RunFolder, tmp_path: Path) -> None:
    graph = knowledge_graph.load(run)
    for match, question in {
        r"no entity 'p33' \(did you mean 'p3'\?\)$": {"head": "p33", "relation": "plus1"},
        r"no relation 'plus3' \(did you mean 'plus\d'\?\)$": {"head": "p3", "relation": "plus3"},
        r"no entity 'p33' \(did you mean 'p3'\?\) and no relation 'zzz'$": {"tail": "p33", "relation": "zzz"},
        "give one end, head or tail": {"relation": "plus1"},
        "give one end, head or tail; ": {"relation": "plus1", "head": "p1", "tail": "p2"},
        "top is 0, it must be 1 or more": {"relation": "plus1", "head": "p1", "top": 0},
    }.items():
        with pytest.raises(TorchstoneError, match=match):
            graph.predict(**question)
    with pytest.raises(TorchstoneError, match="no such run"):
        knowledge_graph.load(tmp_path / "nowhere")
    text = tiny.saved(tmp_path / "text", tiny.recipe(tmp_path))
    with pytest.raises(TorchstoneError, match="model transformer scores no triples"):
        knowledge_graph.load(text.path)
    with pytest.raises(TorchstoneError, match="its data have no entities"):
        text.names("entities")


def test_numbers_beyond_whole_blocks_are_said_once(tmp_path: Path, no_plots: None) -> None:
    def said(name: str, **model: Any) -> list[str]:
        made = load_recipe(knowledge.recipe(tmp_path, model=model, trainer={"steps": 2}))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            train(made, out=tmp_path / name, quiet=True)
        return [str(each.message) for each in caught if "blocks" in str(each.message)]

    notice = "model.block: 24 numbers are 3 blocks of 7; 21 are used"
    assert said("floored", kind="house", dim=24, block=7) == [notice]
    assert RunFolder(tmp_path / "floored").model().entity.shape == (14, 21)
    assert said("whole", kind="house", dim=21, block=7) == said("sums", kind="transe", dim=5) == []


def test_a_recipe_trains_and_its_run_is_asked_from_the_command_line(
    cli: Callable[..., Any], tmp_path: Path, no_plots: None
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_yaml(knowledge.recipe(tmp_path, trainer={"steps": 2})))
    said = cli("train", file, "model.projections=0", "--out", tmp_path / "run")
    assert said.status == 0 and "14 entities, 4 relations" in said.err and "test mrr" in said.err
    asked = ("knowledge-graph", "rank", tmp_path / "run", "--head", "p3", "--relation", "plus2", "--top", "4")
    answers = json.loads(cli(*asked, "--json").out)
    wanted = knowledge_graph.load(tmp_path / "run").predict(head="p3", relation="plus2", top=4)
    assert [(a["name"], pytest.approx(a["score"])) for a in answers] == [(a.name, a.score) for a in wanted]
    lines = cli(*asked).out.splitlines()
    assert [line.split() for line in lines] == [[f"{a.score:.4f}", a.name] for a in wanted]
    refused = cli("knowledge-graph", "rank", tmp_path / "run", "--head", "q3", "--relation", "plus2")
    assert refused.status == 2 and refused.out == "" and "no entity 'q3'" in refused.err
    counts = json.loads(cli("inspect", file, "--json").out)
    assert counts["parameters"] == 14 * 15 + 4 * 15 * (4 + 2) + 2 * 4 * (1 + 3) + 4 * 15
    assert json.loads(cli("inspect", tmp_path / "run", "--json").out)["parameters"] == 14 * 15 + 4 * 15 * 4 + 4 * 15


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ({"objective": {"kind": "causal_lm"}}, "data triples is of triples, and objective causal_lm of tokens"),
        ({"model": {"kind": "mlp"}}, "data triples is of triples, and model mlp of images"),
        ({"data": {"kind": "text"}}, "data text is of tokens, and objective link_prediction of triples"),
    ],
)
def test_examples_of_two_sorts_are_refused(sections: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(TorchstoneError, match=match):
        load_recipe(knowledge.recipe(tmp_path, **sections))


def test_too_few_entities_are_refused_and_more_are_fine(tmp_path: Path, no_plots: None) -> None:
    few = knowledge.recipe(tmp_path)
    few["model"]["entities"] = 13
    with pytest.raises(TorchstoneError, match=r"model.entities: 13 is fewer than data triples's 14"):
        train(few, out=tmp_path / "few", quiet=True)
    few["model"]["entities"] = 16
    done = train(few, [{"trainer": {"steps": 1}}], out=tmp_path / "more", quiet=True)
    answers = knowledge_graph.load(done).predict(head="p1", relation="plus1", top=None)
    assert len(answers) == 14


def test_another_model_is_refused_by_the_objective(tmp_path: Path) -> None:
    with pytest.raises(TorchstoneError, match="needs a model that scores triples"):
        LinkPrediction(LinkPredictionSpec()).check(torch.nn.Linear(2, 2))
    transformer = knowledge.recipe(tmp_path, model={"kind": "transformer", **tiny.MODEL, "vocabulary": 9})
    with pytest.raises(TorchstoneError, match="needs a model that scores triples"):
        train(transformer, out=tmp_path / "run", quiet=True)


def test_memory_of_a_training_is_counted_from_its_triples(tmp_path: Path) -> None:
    recipe = tiny.resolved(knowledge.recipe(tmp_path))[0]
    found = training_memory(recipe)
    assert found.weights == found.gradients == 4 * torchstone.inspect(recipe)["parameters"]
    assert found.activations is not None
    double = training_memory(recipe.override({"trainer": {"batch": 8}})).activations
    assert double is not None and 1.5 * found.activations < double <= 2 * found.activations


@pytest.mark.slow
def test_models_are_compared(tmp_path: Path) -> None:
    made = knowledge.recipe(tmp_path)
    result: Any = torchstone.compare(
        ["model.kind=rotate,transe"],
        2,
        recipe={**made, "model": {"kind": "rotate", "dim": 8}},
        overrides=["trainer.steps=3"],
        metric="test_mrr",
        higher_is_better=True,
        quiet=True,
    )
    assert "test_mrr" in json.dumps(result.to_dict())
