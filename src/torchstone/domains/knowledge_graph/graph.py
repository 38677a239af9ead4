"""A trained run, asked by names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchstone.domains.knowledge_graph.data.triples import Names
from torchstone.domains.knowledge_graph.model._scorer import Scorer
from torchstone.errors import TorchstoneError, nearest
from torchstone.train.environment import choose_device
from torchstone.train.run import RunFolder

__all__ = ["Answer", "KnowledgeGraph", "load"]


@dataclass(frozen=True)
class Answer:
    """An entity and the score of the triple with it in the place that was asked for; the higher the better."""

    name: str
    score: float


class KnowledgeGraph:
    """A model of triples with the names of its entities and relations.

    Attributes:
        model: scores triples.
        entities, relations: names by number.
    """

    def __init__(self, model: Scorer, entities: Names, relations: Names) -> None:
        self.model, self.entities, self.relations = model, entities, relations

    @torch.no_grad()
    def predict(
        self, *, relation: str, head: str | None = None, tail: str | None = None, top: int | None = 10
    ) -> list[Answer]:
        """Entities for the end that is not given, the best first; known facts are among them.

        Args:
            relation: its name.
            head, tail: the name of one end.
            top: how many; None gives all.

        Raises:
            TorchstoneError: unknown names, all of them, each with the nearest; both ends or none; `top` below 1.
        """
        if (head is None) == (tail is None):
            raise TorchstoneError("knowledge graph: give one end, head or tail; the other is what is asked for")
        if top is not None and top < 1:
            raise TorchstoneError(f"knowledge graph: top is {top}, it must be 1 or more")
        asked = [(self.entities, head if head is not None else str(tail)), (self.relations, relation)]
        unknown = [
            f"no {known.what} {name!r}{nearest(name, known.names)}" for known, name in asked if name not in known
        ]
        if unknown:
            raise TorchstoneError(" and ".join(unknown))
        device = self.model.entity.device
        given, of_relation = (torch.tensor([known.number(name)], device=device) for known, name in asked)
        scores_E = self.model(given, of_relation, torch.tensor([head is None], device=device))[0, : len(self.entities)]
        order_E = scores_E.argsort(descending=True, stable=True)[:top].tolist()
        return [Answer(self.entities.names[number], float(scores_E[number])) for number in order_E]


def load(run: str | Path | RunFolder, device: str = "cpu") -> KnowledgeGraph:
    """The knowledge graph that a run has learnt.

    Args:
        run: its directory.
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        TorchstoneError: no run, no weights yet, or a run of another kind of model.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder(run)
    spec: Any = folder.require().model_spec
    if spec.example != "triples":
        raise TorchstoneError(f"{folder.path}: model {spec.kind} scores no triples")
    names = [
        Names(what, folder.names(several)) for what, several in (("entity", "entities"), ("relation", "relations"))
    ]
    model = folder.model(device=choose_device(device))
    assert isinstance(model, Scorer)
    return KnowledgeGraph(model, *names)
