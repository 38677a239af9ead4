"""Triples: reading and refusals, negatives that are no facts, batches as pure functions, masks by counting."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import knowledge
import numpy as np
import pytest
import torch

from torchstone.domains.knowledge_graph.data.triples import PreparedTriples, TriplesSpec
from torchstone.errors import TorchstoneError
from torchstone.keys import Key


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return knowledge.ring(tmp_path / "graph")


def prepared(folder: Path, **fields: Any) -> PreparedTriples:
    return TriplesSpec(path=str(folder), **fields).prepare()


def named(data: PreparedTriples, batch: dict[str, torch.Tensor]) -> list[knowledge.Fact]:
    e, r = data.entities.names, data.relations.names
    return [
        (e[h], r[p], e[t]) for h, p, t in zip(*(batch[n].tolist() for n in ("head", "relation", "tail")), strict=True)
    ]


def test_names_are_numbered_in_the_order_of_the_dictionary_or_of_the_files(graph: Path) -> None:
    data = prepared(graph)
    order = list(dict.fromkeys(name for split in ("train", "valid", "test") for h, _, t in knowledge.facts(graph, split)
                               for name in (h, t)))  # fmt: skip
    assert data.names["entities"] == order and data.sizes == {"entities": 14, "relations": 4}
    (graph / "entities.dict").write_text("".join(f"{13 - n}\tp{n}\n" for n in range(14)))
    (graph / "relations.dict").write_text("1\tplus1\n0\tplus2\n\n2\tplus5\n3\tparity\r\n")
    again = prepared(graph)
    assert again.names == {
        "entities": [f"p{n}" for n in reversed(range(14))],
        "relations": ["plus2", "plus1", "plus5", "parity"],
    }
    assert again.hash != data.hash and "14 entities, 4 relations" in again.description
    assert "train 40, valid 7, test 9" in again.description


def test_an_epoch_visits_every_fact_once_from_each_end(graph: Path) -> None:
    data = prepared(graph, negatives=3)
    wanted = Counter(knowledge.facts(graph, "train"))
    for end in (0, 1):
        seen: Counter[knowledge.Fact] = Counter()
        for step in range(end, 20, 2):  # ten steps of four rows
            batch = data.train.batch(Key(1), step, 4)
            assert batch["seeks_head"].tolist() == [end == 1] * 4
            seen.update(named(data, batch))
        assert seen == wanted


def test_micro_batches_and_ranks_draw_alike_and_keys_and_steps_differ(graph: Path) -> None:
    data = prepared(graph)
    whole = data.train.batch(Key(1), 3, 8)
    for kind in ("micro", "rank"):
        parts = [data.train.batch(Key(1), 3, 4, *((n, 2) if kind == "micro" else (0, 1, n, 2))) for n in range(2)]
        for name, value in whole.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), value), name
    assert not torch.equal(whole["negative"], data.train.batch(Key(2), 3, 8)["negative"])
    assert not torch.equal(whole["negative"], data.train.batch(Key(1), 5, 8)["negative"])


def test_negatives_are_uniform_over_entities_that_are_no_fact_of_train(graph: Path) -> None:
    data = prepared(graph, negatives=400)
    train = set(knowledge.facts(graph, "train"))
    names = data.entities.names
    drawn: dict[tuple[str, str, bool], Counter[str]] = {}
    for step in range(40):
        batch = data.train.batch(Key(0), step, 8)
        for (h, r, t), by_head, row in zip(named(data, batch), batch["seeks_head"].tolist(), batch["negative"].tolist(),
                                           strict=True):  # fmt: skip
            drawn.setdefault((t if by_head else h, r, by_head), Counter()).update(names[n] for n in row)
    for (given, relation, by_head), counts in drawn.items():
        free = {e for e in names if ((e, relation, given) if by_head else (given, relation, e)) not in train}
        assert set(counts) == free
        expected = counts.total() / len(free)
        assert all(abs(count - expected) < 6 * expected**0.5 for count in counts.values())
    assert {len([e for e in counts]) for (_, r, _), counts in drawn.items() if r == "parity"} >= {13}


def test_weights_are_those_of_the_frequencies(graph: Path) -> None:
    data = prepared(graph)
    train = knowledge.facts(graph, "train")
    from_head, from_tail = Counter((h, r) for h, r, _ in train), Counter((r, t) for _, r, t in train)
    weight = {(h, r, t): (3 + from_head[h, r] + 3 + from_tail[r, t]) ** -0.5 for h, r, t in train}
    batch = data.train.batch(Key(0), 0, 40)
    wanted = np.array([weight[fact] for fact in named(data, batch)])
    np.testing.assert_allclose(batch["weight"], wanted / wanted.min(), rtol=1e-6)
    assert batch["weight"].min() == 1 and batch["weight"].max() > 1.1


def test_evaluation_asks_each_fact_from_both_ends_with_the_other_answers_masked(graph: Path) -> None:
    data = prepared(graph, negatives=50)
    facts = {fact for split in ("train", "valid", "test") for fact in knowledge.facts(graph, split)}
    names, rows = data.entities.names, []
    for batch in data.test.evaluation(6):
        assert len(batch["head"]) <= 6 and bool((batch["weight"] == 1).all())
        for n, (h, r, t) in enumerate(named(data, batch)):
            by_head = bool(batch["seeks_head"][n])
            rows.append((h, r, t, by_head))
            others = {
                e for e in names
                if ((e, r, t) if by_head else (h, r, e)) in facts and e != (h if by_head else t)
            }  # fmt: skip
            assert {names[i] for i in batch["known"][n].nonzero()[:, 0].tolist()} == others
            assert not {names[i] for i in batch["negative"][n].tolist()} & (others | {h if by_head else t})
    wanted = [(*fact, by_head) for fact in knowledge.facts(graph, "test") for by_head in (False, True)]
    assert rows == wanted
    first, again = (list(data.test.evaluation(6)) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, again, strict=True) for name in a)
    some = [fact for batch in data.test.evaluation(100, limit=3) for fact in named(data, batch)[::2]]
    assert some == [knowledge.facts(graph, "test")[n] for n in (0, 3, 6)]
    assert len(next(iter(data.test.evaluation(1)))["head"]) == 2
    assert [list(data.test.evaluation(4, limit=0))] == [[]]


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("train.txt", "p1\tplus1\tp2\np1 plus1 p2\n", r"train.txt line 2: a triple is three names .* has 1$"),
        ("valid.txt", "p1\tplus1\n", r"valid.txt line 1: a triple is three names separated by tabs, this line has 2$"),
        ("test.txt", "\n\np1\tplus1\tp2\tp3\n", r"test.txt line 3: a triple is three names .* has 4$"),
        ("test.txt", "p1\t\tp3\n", r"test.txt line 1: .* has 2$"),
        ("train.txt", "\n", r"train.txt holds no triple$"),
        ("entities.dict", "0\tp0\n1\n", r"entities.dict line 2: a line is a number, a tab and a name$"),
        ("entities.dict", "0\tp0\n0\tp1\n", r"entities.dict line 2: number 0 stands twice$"),
        ("entities.dict", "0\tp0\n1\tp0\n", r"entities.dict line 2: 'p0' stands twice$"),
        ("entities.dict", "0\tp0\n2\tp1\n", r"entities.dict: numbers must go from 0 to 1; 1 is missing$"),
        ("relations.dict", "0\tplus1\n1\tplus2\n2\tplus5\n3\tparities\n", r"no relation 'parity' \(did you mean "
         r"'parities'\?\)$"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_with_file_and_line(graph: Path, file: str, text: str, said: str) -> None:
    (graph / file).write_text(text)
    with pytest.raises(TorchstoneError, match=said):
        prepared(graph)


def test_names_outside_of_the_dictionary_are_named_with_the_nearest_and_their_line(graph: Path) -> None:
    (graph / "entities.dict").write_text("".join(f"{n}\tp{n}\n" for n in range(14)))
    knowledge.write(graph / "test.txt", [("p1", "plus1", "p2"), ("p1", "plus1", "p133")])
    with pytest.raises(TorchstoneError, match=r"test.txt line 2: no entity 'p133' \(did you mean 'p13'\?\)$"):
        prepared(graph)


def test_missing_folders_files_and_other_bytes_are_refused(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(TorchstoneError, match=r"no such folder: 'nowhere'$"):
        prepared(Path("nowhere"))
    (graph / "valid.txt").unlink()
    with pytest.raises(TorchstoneError, match=r"cannot read '.*valid.txt': No such file"):
        prepared(graph)
    (graph / "valid.txt").write_bytes(b"p1\tplus1\tp\xff\n")
    with pytest.raises(TorchstoneError, match=r"valid.txt: not UTF-8 at byte 10$"):
        prepared(graph)


def test_entities_that_train_does_not_know_are_named(graph: Path) -> None:
    assert "not in train" not in prepared(graph).description
    new = [(f"new{n}", "plus1", "p1") for n in range(7)]
    knowledge.write(graph / "test.txt", [*knowledge.facts(graph, "test"), *new])
    data = prepared(graph)
    assert data.description.endswith("in valid or test and not in train: new0, new1, new2, new3, new4 and 2 more")


def test_a_query_that_every_entity_answers_is_refused(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        knowledge.write(tmp_path / f"{split}.txt", [("a", "likes", "a"), ("a", "likes", "b"), ("b", "likes", "a")])
    with pytest.raises(TorchstoneError, match=r"every entity is an answer to \(a, likes, \?\), so there is nothing"):
        prepared(tmp_path)


def test_empty_valid_and_test_are_fine(graph: Path) -> None:
    for split in ("valid", "test"):
        (graph / f"{split}.txt").write_text("")
    data = prepared(graph)
    assert len(data.test) == 0 and list(data.test.evaluation(4)) == []
