# SPDX-License-Identifier: Apache-2.0
"""Joins the shards of a tensor from several ranks, and cuts tensors for another number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement


def assemble(shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """The whole tensor from the shards of all ranks. Plain tensors are whole on every rank; the first is returned.

    Needs no process group. Shards may have different sizes or be empty.

    Raises:
        ValueError: a placement is neither Shard nor Replicate, or the shards do not add up to the tensor.
    """
    first = shards[0]
    if not isinstance(first, DTensor):
        return first

    def join(ranks: torch.Tensor, placements: Sequence[Placement]) -> torch.Tensor:
        """The part that these ranks hold together; `ranks` has one dimension per placement."""
        if not placements:
            return shards[int(ranks)]._local_tensor  # `to_local` is for autograd
        if type(placements[0]) is Replicate:
            return join(ranks[0], placements[1:])
        if type(placements[0]) is not Shard:
            raise ValueError(f"placement {placements[0]!r} is not known here, only Shard and Replicate")
        parts = [join(part, placements[1:]) for part in ranks]
        filled = [part for part in parts if part.numel()] or parts[:1]
        return torch.cat(filled, dim=placements[0].dim)

    whole = join(first.device_mesh.mesh, first.placements)
    if whole.shape != first.shape:
        raise ValueError(f"the shards make up {tuple(whole.shape)}, but the tensor is {tuple(first.shape)}")
    return whole


def cut_like(whole: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a whole tensor, sharded like `pattern`, in host memory.

    If `pattern` is not sharded or has another shape, the tensor stays whole.
    """
    if not isinstance(pattern, DTensor) or pattern.shape != whole.shape:
        return whole
    mesh = pattern.device_mesh
    share = distribute_tensor(whole.to(mesh.device_type), mesh, pattern.placements, src_data_rank=None)
    return DTensor.from_local(
        share.to_local().cpu(), mesh, pattern.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def sharding_group_size(tensors: Sequence[torch.Tensor]) -> int:
    """Number of ranks that share one copy of a model. The mesh's first dimension may have replicas of it."""
    return next((value.device_mesh.size(-1) for value in tensors if isinstance(value, DTensor)), 1)
