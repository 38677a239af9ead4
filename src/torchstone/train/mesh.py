"""The device mesh: one mesh with named axes, of size 1 unless the recipe says otherwise.

Axes: data, shard, tensor, context, expert, pipeline. Parts use axis names only. Today the data axis may be larger than
1: replicas see different batches, and gradients are summed, which is right because terms are sums over global counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchstone.errors import TorchstoneError
from torchstone.recipe import ParallelSpec

__all__ = ["AXES", "Mesh", "build_mesh"]

AXES = ("data", "shard", "tensor", "context", "expert", "pipeline")
_BUCKET = 1 << 23
"""Elements summed in one call: large enough to hide latency, small enough not to double the memory."""


class Mesh:
    """Ranks and reductions over the data axis; a mesh of one rank needs no process group."""

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        self.mesh = mesh
        self.group = None if mesh is None else mesh.get_group("data")
        self.rank = 0 if mesh is None else mesh.get_local_rank("data")
        self.ranks = 1 if mesh is None else mesh.size(0)

    @property
    def first(self) -> bool:
        """Whether this rank writes files."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed over the data axis, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def sum_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """Sum gradients over the data axis, in buckets. A rank that had none contributes zeros; where no rank had one
        there is none, for an optimiser moves what has a gradient of zeros."""
        if self.group is None:
            return
        every = list(parameters)
        if not every:
            return
        has = torch.tensor([parameter.grad is not None for parameter in every], device=every[0].device)
        some = self.sum(has.to(torch.float32)).tolist()
        bucket: list[torch.Tensor] = []
        for parameter, count in zip(every, some, strict=True):
            if not count:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(grad.numel() for grad in bucket) >= _BUCKET:
                self._sum_bucket(bucket)
                bucket = []
        if bucket:
            self._sum_bucket(bucket)

    def _sum_bucket(self, grads: list[torch.Tensor]) -> None:
        flat = self.sum(torch.cat([grad.flatten() for grad in grads]))
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.group is not None:
            dist.barrier(group=self.group)


def build_mesh(spec: ParallelSpec, device: torch.device) -> Mesh:
    """The mesh of a recipe. More than one rank needs `torchrun`, whose environment says who is who.

    Raises:
        TorchstoneError: an axis that is not there yet, or a number of processes that does not fit.
    """
    wide = [axis for axis in AXES if axis != "data" and getattr(spec, axis) > 1]
    if wide:
        raise TorchstoneError(f"parallel.{wide[0]}: {getattr(spec, wide[0])} asked, only data may be more than 1 today")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if spec.data != world:
        raise TorchstoneError(
            f"parallel.data: {spec.data} ranks asked, {world} running; start {spec.data} with "
            f"torchrun --nproc-per-node {spec.data} -m torchstone train ..."
        )
    if world == 1:
        return Mesh()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    sizes = tuple(getattr(spec, axis) for axis in AXES)
    return Mesh(init_device_mesh(device.type, sizes, mesh_dim_names=AXES))
