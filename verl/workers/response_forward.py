# SPDX-License-Identifier: Apache-2.0
"""A model's forward pass over sequences, for what it says of the response tokens and nothing of the prompt's.

Shapes: N sequences, R response length, S = prompt length + R, L response tokens of all rows, K numbers that the model
gives for a token, W ranks that share a row.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import ProcessorMixin

from verl.data.features import featurize
from verl.models.attention_table import extend_attention
from verl.models.flops import FlopCounter, Work
from verl.models.registry import media_token_types
from verl.models.sequence_parallel import SequenceGroup
from verl.models.token_layout import PackedLayout, PaddedLayout, TokenLayout, why_not_packed
from verl.models.trainable import vision_tower
from verl.protocol import DataProto
from verl.utils.seqlen_balancing import prepare_dynamic_batch, restore_dynamic_batch
from verl.workers.actor.config import TrainedModelConfig

logger = logging.getLogger(__name__)


class ResponseForward:
    """One number for each response token, under one model; a subclass says which.

    Args:
        model: takes `logits_to_keep` and answers with `logits`.
        processor: turns images to features; None for text models.
        device: of the computation.
        config: of the trained model; `padding_free` and `dynamic_batching` are read.
        group: the ranks that share every row with this one, and have the same rows; None for a rank of its own.

    Raises:
        ValueError: ranks are to share rows of a model that cannot be packed.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: ProcessorMixin | None,
        device: torch.device,
        config: TrainedModelConfig,
        group: SequenceGroup | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.device = device
        self.group = group
        obstacle = why_not_packed(model) if config.padding_free or group is not None else None
        if group is not None and obstacle is not None:
            raise ValueError(f"ulysses_size={group.size} needs rows without padding, but {obstacle}; use 1")
        if obstacle is not None:
            logger.warning("padding_free=true has no effect on %s: %s", type(model).__name__, obstacle)
        self.packs = group is not None or (config.padding_free and obstacle is None)
        self.fills_by_tokens = config.dynamic_batching
        self.counter = FlopCounter(model, vision_tower(model))
        self.work = Work()
        """Operations of all forwards since someone last set it to none."""
        if self.packs:
            extend_attention()

    def __call__(self, rows: DataProto) -> torch.Tensor:
        """(N, R) float32, zero outside `response_mask`.

        Args:
            rows: `input_ids`, `attention_mask` (N, S), `position_ids` (N, S) or (N, 4, S), `responses`,
                `response_mask` (N, R); non-tensor `multi_modal_data` for image-text models.
        """
        raise NotImplementedError

    def layout(self, rows: DataProto) -> TokenLayout:
        """How the rows lie before the model."""
        return PackedLayout(rows, self.group) if self.packs else PaddedLayout(rows)

    def inputs(self, rows: DataProto, layout: TokenLayout) -> dict[str, Any]:
        """All keywords of the model's forward, on the device; the forward counts as work done."""
        media = self._media_inputs(rows)
        lengths = rows.batch["attention_mask"].sum(dim=1).tolist()
        self.work += self.counter.count(lengths, int(layout.response_mask.sum()), media)
        inputs = {**layout.model_inputs(), **media, "use_cache": False}
        inputs |= media_token_types(self.model.config, inputs["input_ids"])
        return {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
        }

    def _media_inputs(self, rows: DataProto) -> dict[str, torch.Tensor]:
        if self.processor is None:
            return {}
        return featurize(rows.non_tensor_batch["multi_modal_data"], self.processor)

    def micro_batches(self, data: DataProto, size: int) -> tuple[list[DataProto], list[Sequence[int]]]:
        """Pieces that go through the model at once, and the rows of `data` that each has; as many on every rank.

        With dynamic batching a piece has at most as many tokens as `size` rows of full length, else `size` rows, the
        last one fewer if need be. W ranks that share their rows take W times as much at once.
        """
        size *= 1 if self.group is None else self.group.size
        if self.fills_by_tokens:
            return prepare_dynamic_batch(data, size * data.batch["input_ids"].shape[1], self.packs)
        places = [range(start, min(start + size, len(data))) for start in range(0, len(data), size)]
        return [data[rows.start : rows.stop] for rows in places], places


def compute_per_token(forward: ResponseForward, data: DataProto, micro_batch_size: int) -> torch.Tensor:
    """(N, R) float32 on the CPU: what `forward` gives for all rows, without gradient."""
    (stream,) = compute_streams(forward, lambda rows: (forward(rows),), data, micro_batch_size)
    return stream


def compute_streams(
    forward: ResponseForward,
    compute: Callable[[DataProto], tuple[torch.Tensor, ...]],
    data: DataProto,
    micro_batch_size: int,
) -> list[torch.Tensor]:
    """What `compute` gives for all rows, (N, ...) each on the CPU, without gradient.

    Args:
        forward: whose model `compute` runs, and which cuts the rows into micro-batches.
        compute: from rows to tensors with as many rows.
        micro_batch_size: as in `ResponseForward.micro_batches`.
    """
    forward.model.eval()
    micro_batches, places = forward.micro_batches(data, micro_batch_size)
    with torch.no_grad():
        parts = [[tensor.cpu() for tensor in compute(rows)] for rows in micro_batches]
    return [restore_dynamic_batch(torch.cat(stream), places) for stream in zip(*parts, strict=True)]
