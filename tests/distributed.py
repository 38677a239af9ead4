"""Several processes of one gloo group on this machine, for tests of what ranks share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from torchstone.recipe import ParallelSpec
from torchstone.train.mesh import Mesh, build_mesh


def run_ranks(work: Callable[..., Any], ranks: int = 2, *arguments: Any) -> list[Any]:
    """``work(mesh, *arguments)`` on every rank at once; what each rank returned, by rank.

    `work` is a function at the top of an importable module, and what it returns can be saved by torch.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (ranks, folder, work, arguments), nprocs=ranks)
        return [torch.load(Path(folder, f"out{rank}.pt"), weights_only=False) for rank in range(ranks)]


def _rank(rank: int, ranks: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["WORLD_SIZE"], os.environ["RANK"] = str(ranks), str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    try:
        mesh: Mesh = build_mesh(ParallelSpec(data=ranks), torch.device("cpu"))
        torch.save(work(mesh, *arguments), Path(folder, f"out{rank}.pt"))
    finally:
        dist.destroy_process_group()
