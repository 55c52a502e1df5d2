# SPDX-License-Identifier: Apache-2.0
"""What NCCL asks of tensors beyond gloo, which the tests run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all_single",
    "broadcast",
    "reduce_scatter_tensor",
)


def hold_collectives_to_nccl() -> None:
    """From now on in this process, a collective of tensors that NCCL would refuse is an error; once is enough."""
    for name in COLLECTIVES:
        collective = getattr(dist, name)
        if collective.__module__ != __name__:
            setattr(dist, name, _held(collective))


def _held(collective: Callable[..., Any]) -> Callable[..., Any]:
    def held(*args: Any, **kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.is_contiguous() for tensor in tensors), f"{collective.__name__}: a tensor is not contiguous"
        assert len({tensor.device for tensor in tensors}) <= 1, f"{collective.__name__}: tensors on several devices"
        return collective(*args, **kwargs)

    return held
