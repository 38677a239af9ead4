"""Knowledge graphs: facts as triples (head, relation, tail), embeddings that score them, and link prediction.

The parts are found by the registry: data `triples`, models `transe`, `rotate` and `house`, objective `link_prediction`.
`load` asks a trained run. Importing this package imports none of them.

Shapes: B rows, N candidates, E entities, R relations, D numbers of an entity, n blocks of k numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchstone.domains.knowledge_graph.graph import Answer, KnowledgeGraph, load

__all__ = ["Answer", "KnowledgeGraph", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.graph"), name)
