"""Indexes of FAISS (Douze et al. 2024, arXiv 2401.08281) for a `Bank`: which vectors have the largest inner products.

Imported only where a memory asks for one; it needs the extra `memory`. An index is made of the vectors that are there
and serves until they change: an approximate one pays where a memory is read far more often than written.

Shapes: N vectors, Q queries, M results, K dimensions.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from torchstone.errors import TorchstoneError

__all__ = ["build_index", "require", "search"]

_NEIGHBOURS, _WIDTH = 32, 128
"""Of the graph: links of a vector, and candidates that are kept while it is made and searched."""


def require() -> Any:
    """The library.

    Raises:
        TorchstoneError: it is not installed.
    """
    try:
        return importlib.import_module("faiss")
    except ImportError:
        raise TorchstoneError("memory.index: needs the extra `memory`: pip install 'torchstone[memory]'") from None


def build_index(kind: str, vectors_NK: torch.Tensor) -> Any:
    """An index over vectors: "flat" compares with all, "hnsw" follows a graph of neighbours and may miss some."""
    faiss, dim = require(), vectors_NK.shape[1]
    if kind == "flat":
        index = faiss.IndexFlatIP(dim)
    else:
        index = faiss.IndexHNSWFlat(dim, _NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _WIDTH
    index.add(vectors_NK.detach().cpu().float().contiguous().numpy())
    return index


def search(index: Any, q_QK: torch.Tensor, count: int) -> torch.Tensor:
    """Numbers of the vectors with the largest inner products, int64 (Q, M), on the queries' device; -1 where an
    approximate index found fewer than `count`."""
    if hasattr(index, "hnsw"):
        index.hnsw.efSearch = max(_WIDTH, 2 * count)
    _, found_QM = index.search(q_QK.detach().cpu().float().contiguous().numpy(), count)
    return torch.from_numpy(found_QM).to(q_QK.device)
