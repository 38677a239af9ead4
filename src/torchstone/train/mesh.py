"""The device mesh: one mesh with named axes, of size 1 unless the recipe says otherwise.

Axes: data, shard, tensor, context, expert, pipeline. Parts use axis names only. Today the data axis may be larger than
1: replicas see different batches, and gradients are summed, which is right because terms are sums over global counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchstone.errors import TorchstoneError
from torchstone.recipe import ParallelSpec

__all__ = ["AXES", "Mesh", "build_mesh"]

AXES = ("data", "shard", "tensor", "context", "expert", "pipeline")
_BUCKET = 1 << 23
"""Elements summed or sent in one call: large enough to hide latency, small enough not to double the memory."""


class Mesh:
    """Ranks and what they tell one another over the data axis; a mesh of one rank needs no process group.

    Args:
        mesh: of torch; None for one rank.
        zero: stage of ZeRO.
    """

    def __init__(self, mesh: DeviceMesh | None = None, zero: int = 0) -> None:
        self.mesh, self.zero = mesh, zero
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
        grads = []
        for parameter, count in zip(every, some, strict=True):
            if not count:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad)
        for bucket in _buckets(grads):
            flat = self.sum(torch.cat([grad.flatten() for grad in bucket]))
            _put(flat, bucket)

    def send(self, tensors: Iterable[torch.Tensor], rank: int) -> None:
        """Values of tensors of one type and device, from `rank` to all others, in place, in buckets."""
        if self.group is None:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.broadcast(flat, group=self.group, group_src=rank)
            if rank != self.rank:
                _put(flat, bucket)

    def told(self, thing: Any, rank: int) -> Any:
        """What `rank` has for `thing`, small and without tensors, on all ranks."""
        if self.group is None:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, group=self.group, group_src=rank)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.group is not None:
            dist.barrier(group=self.group)


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(each.numel() for each in bucket) >= _BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _put(flat: torch.Tensor, bucket: list[torch.Tensor]) -> None:
    for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


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
    return Mesh(init_device_mesh(device.type, sizes, mesh_dim_names=AXES), spec.zero)
