# SPDX-License-Identifier: Apache-2.0
"""Tensors in the shards of several ranks: put together, and cut for another number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement


def assemble(shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """The whole of a tensor from the share of each rank; of plain tensors, which every rank holds whole, the first.

    Needs no process group. Shards may be of different size or empty.

    Raises:
        ValueError: a placement other than Shard and Replicate, or shards that do not make up the tensor.
    """
    first = shards[0]
    if not isinstance(first, DTensor):
        return first

    def put_together(ranks: torch.Tensor, placements: Sequence[Placement]) -> torch.Tensor:
        """The share of these ranks: a mesh of as many dimensions as there are placements."""
        if not placements:
            return shards[int(ranks)]._local_tensor  # `to_local` is for autograd
        if type(placements[0]) is Replicate:
            return put_together(ranks[0], placements[1:])
        if type(placements[0]) is not Shard:
            raise ValueError(f"placement {placements[0]!r} is not known here, only Shard and Replicate")
        parts = [put_together(part, placements[1:]) for part in ranks]
        filled = [part for part in parts if part.numel()] or parts[:1]
        return torch.cat(filled, dim=placements[0].dim)

    whole = put_together(first.device_mesh.mesh, first.placements)
    if whole.shape != first.shape:
        raise ValueError(f"the shards make up {tuple(whole.shape)}, but the tensor is {tuple(first.shape)}")
    return whole


def cut_like(whole: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """This rank's share of a whole tensor that every rank has, sharded as `pattern`, in host memory.

    Where `pattern` is no shard, or of another shape, the tensor stays whole.
    """
    if not isinstance(pattern, DTensor) or pattern.shape != whole.shape:
        return whole
    mesh = pattern.device_mesh
    share = distribute_tensor(whole.to(mesh.device_type), mesh, pattern.placements, src_data_rank=None)
    return DTensor.from_local(
        share.to_local().cpu(), mesh, pattern.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def sharding_group_size(tensors: Sequence[torch.Tensor]) -> int:
    """Ranks that share one copy of a model; groups of ranks that repeat it are the mesh's first dimension."""
    return next((value.device_mesh.size(-1) for value in tensors if isinstance(value, DTensor)), 1)
