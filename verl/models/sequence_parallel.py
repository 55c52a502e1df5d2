# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism: each rank runs the layers on its slice of a row, and attention on its share of the heads.

Source: DeepSpeed Ulysses, arXiv 2309.14509, section 3. Delta: the vision tower is not split this way. It runs on every
rank of the group, and its gradient comes only from the rank's own slice.

Shapes: T tokens in a row, W ranks of the group, H heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class SequenceGroup:
    """The group of ranks that share every row."""

    process_group: dist.ProcessGroup
    size: int
    """W."""
    rank: int
    """Rank of this process in the group."""

    def local_slice(self, length: int) -> slice:
        """This rank's positions in a row of `length`, a multiple of W."""
        assert length % self.size == 0, f"{length} tokens do not divide over {self.size} ranks"
        share = length // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def exchange_heads(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """From all heads at this rank's positions to this rank's heads at all positions.

        Args:
            tensors: (1, H, T / W, D) each; H may differ. If a tensor has fewer heads than W (keys and values of
                grouped-query attention), its heads are repeated for the ranks that need them.

        Returns:
            (1, H / W, T, D) each.
        """
        return [self._exchange_heads(tensor) for tensor in tensors]

    def _exchange_heads(self, tensor: torch.Tensor) -> torch.Tensor:
        heads = tensor.shape[1]
        if heads < self.size:
            tensor = tensor.repeat_interleave(self.size // heads, dim=1)
        by_rank = tensor[0].unflatten(0, (self.size, -1))  # (W, H / W, T / W, D)
        received = _AllToAll.apply(by_rank, self.process_group)  # (W, H / W, T / W, D), first of all the positions
        return received.transpose(0, 1).flatten(1, 2)[None]  # (1, H / W, T, D)

    def exchange_positions(self, tensor: torch.Tensor) -> torch.Tensor:
        """The way back for the output of attention: from (1, T, H / W, D) to (1, T / W, H, D)."""
        by_rank = tensor[0].unflatten(0, (self.size, -1))  # (W, T / W, H / W, D)
        received = _AllToAll.apply(by_rank, self.process_group)  # (W, T / W, H / W, D), first of all the heads
        return received.transpose(0, 1).flatten(1, 2)[None]  # (1, T / W, H, D)

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """(T, ...) from (T / W, ...). In the backward pass each rank takes the gradient of its part.

        Every rank of the group computes the same loss of the whole, so the ranks' parts together are its gradient.
        """
        return _AllGather.apply(own, self)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over the ranks' tensors, without gradient."""
        total = values.detach().clone()
        dist.all_reduce(total, group=self.process_group)
        return total / self.size


def join_sequence_group(size: int) -> SequenceGroup | None:
    """This rank's group of `size` neighbouring ranks; None if `size` is 1.

    A collective over all ranks; `size` must divide their number.
    """
    if size == 1:
        return None
    rank = dist.get_rank()
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, dist.get_world_size(), size)]
    return SequenceGroup(groups[rank // size], size, rank % size)


def _shares(heads: int, kv_heads: int, size: int) -> bool:
    return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def share_rows(model: nn.Module, size: int, keyword: str) -> None:
    """Makes the decoder of `model` run on this rank's slice of each shared row.

    Vision features are inserted before the cut, so that all ranks cut the same row.

    Args:
        size: number of ranks in a group.
        keyword: name of the forward's keyword argument whose value has the `group`, or is None.

    Raises:
        ValueError: the ranks cannot share the model's attention heads evenly.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if not _shares(heads, kv_heads, size):
        fitting = [str(count) for count in range(1, heads + 1) if _shares(heads, kv_heads, count)]
        raise ValueError(
            f"ulysses_size={size}: {heads} attention heads and {kv_heads} key-value heads of {type(model).__name__} "
            f"cannot be divided evenly among {size} ranks; use {', '.join(fitting)}"
        )

    def cut(_: nn.Module, args: tuple, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        group: SequenceGroup | None = getattr(inputs.get(keyword), "group", None)
        if group is None:
            return None
        assert not args, f"{type(model).__name__} calls its decoder with arguments by position, which cannot be cut"
        cut_inputs = dict(inputs)
        tokens = next(inputs[name] for name in ("inputs_embeds", "input_ids") if inputs.get(name) is not None)
        own = group.local_slice(tokens.shape[1])
        for name in ("input_ids", "inputs_embeds", "visual_pos_masks"):
            if inputs.get(name) is not None:
                cut_inputs[name] = inputs[name][:, own]
        cut_inputs["position_ids"] = inputs["position_ids"][..., own]
        if inputs.get("deepstack_visual_embeds") is not None:  # one row for each image token, in their order
            places = inputs["visual_pos_masks"][0]  # (T,)
            first, count = int(places[: own.start].sum()), int(places[own].sum())
            cut_inputs["deepstack_visual_embeds"] = [
                embeds[first : first + count] for embeds in inputs["deepstack_visual_embeds"]
            ]
        return args, cut_inputs

    model.get_decoder().register_forward_pre_hook(cut, with_kwargs=True)


class _AllToAll(torch.autograd.Function):
    """Sends part i to rank i and receives rank i's part for this rank in its place. It is its own inverse, and
    therefore its own gradient."""

    @staticmethod
    def forward(ctx, parts: torch.Tensor, process_group: dist.ProcessGroup) -> torch.Tensor:
        ctx.process_group = process_group
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, parts.contiguous(), group=process_group)
        return received

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _AllToAll.apply(grad, ctx.process_group), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(own) for _ in range(group.size)]
        dist.all_gather(parts, own.contiguous(), group=group.process_group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad[ctx.group.local_slice(len(grad))], None
