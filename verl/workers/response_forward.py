# SPDX-License-Identifier: Apache-2.0
"""A model's forward pass over sequences, for streams of the response tokens only.

Shapes: N sequences, R response length, S = prompt length + R, L response tokens of all rows, K streams of the output
head, W ranks that share a row.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from verl.data.features import Featurizer
from verl.data.image_noise import ImageNoise
from verl.models.attention_table import extend_attention
from verl.models.flops import FlopCounter, Work
from verl.models.output_head import forward_with_head
from verl.models.registry import media_token_types
from verl.models.sequence_parallel import SequenceGroup
from verl.models.token_layout import PackedLayout, PaddedLayout, SharedPromptLayout, TokenLayout, why_not_packed
from verl.models.trainable import vision_tower, without_adapters
from verl.protocol import DataProto
from verl.utils.device_copies import to_device
from verl.utils.logprobs import LazyLogits
from verl.utils.seqlen_balancing import prepare_dynamic_batch, restore_dynamic_batch
from verl.workers.actor.config import TrainedModelConfig

logger = logging.getLogger(__name__)

Column = torch.Tensor | np.ndarray
"""A stream of a batch: numbers (N, ...), or an array (N,) of Python objects."""


class ResponseForward(ABC):
    """Streams of numbers per response token, from forward passes of one model.

    A subclass defines the streams of its output head, and may add streams that are observed inside the model.

    Args:
        model: takes `logits_to_keep` and returns `logits`.
        featurizer: turns images into model inputs; None for text-only models.
        device: the device of the computation.
        config: the trained model's section; `padding_free` and `dynamic_batching` are read.
        group: the ranks that share every row with this one and have the same rows; None for a single rank.
        is_base: runs the model without its adapters.

    Raises:
        ValueError: `group` is given, but the model cannot be packed.
    """

    head_streams: tuple[str, ...]
    """Names of the streams (N, R) of the output head."""
    constant_streams: tuple[str, ...] = ()
    """The head's streams that carry no gradient."""
    tap_streams: tuple[str, ...] = ()
    """Names of the streams that are observed inside the model."""

    def __init__(
        self,
        model: nn.Module,
        featurizer: Featurizer | None,
        device: torch.device,
        config: TrainedModelConfig,
        group: SequenceGroup | None = None,
        is_base: bool = False,
    ) -> None:
        self.model = model
        self.featurizer = featurizer
        self.device = device
        self.group = group
        self.is_base = is_base
        obstacle = why_not_packed(model) if config.padding_free or group is not None else None
        if group is not None and obstacle is not None:
            raise ValueError(f"ulysses_size={group.size} needs rows without padding, but {obstacle}; use 1")
        if obstacle is not None:
            logger.warning("padding_free=true has no effect on %s: %s", type(model).__name__, obstacle)
        self.packs = group is not None or (config.padding_free and obstacle is None)
        self.shares_prompts = self.packs and config.shares_prompts
        self.fills_by_tokens = config.dynamic_batching
        self.counter = FlopCounter(model, vision_tower(model))
        self.work = Work()
        """Floating-point operations of all forwards since the last reset."""
        if self.packs:
            extend_attention()

    def measure(self, rows: DataProto, wanted: Collection[str]) -> dict[str, Column]:
        """The wanted streams of a micro-batch, from one forward, with gradient where autograd is on.

        Args:
            rows: `input_ids`, `attention_mask` (N, S), `position_ids` (N, S) or (N, 4, S), `response_mask` (N, R);
                non-tensor `multi_modal_data` for image-text models, and `uid` if packed rows share prompts.
            wanted: names from `head_streams` and `tap_streams`.

        Returns:
            Streams by name, (N, R) float32 and zero outside `response_mask`, unless a subclass documents otherwise.
        """
        unknown = set(wanted) - {*self.head_streams, *self.tap_streams}
        assert not unknown, f"{type(self).__name__} has no {sorted(unknown)}"
        names = [name for name in self.head_streams if name in wanted]
        layout = self._layout(rows)
        inputs = self._inputs(rows, layout)
        head = self._head(rows, layout, inputs, names)
        with self._adapters(), self._tap(rows, layout, wanted) as observed:
            columns = forward_with_head(self.model, head, inputs, layout.label_outputs)  # (L, K)
        return layout.as_streams(names, columns, self.constant_streams) | observed

    @torch.no_grad()
    def measure_all(self, data: DataProto, wanted: Collection[str], micro_batch_size: int) -> dict[str, Column]:
        """`measure` for any number of rows, in micro-batches, without gradient; the results are on the CPU."""
        self.model.eval()
        micro_batches, places = self.micro_batches(data, micro_batch_size)
        parts = [self.measure(rows, wanted) for rows in micro_batches]
        # Copied after all were started: copying each at once would leave the device idle while the next is prepared.
        return {name: restore_dynamic_batch(_joined([part[name] for part in parts]), places) for name in parts[0]}

    def micro_batches(self, data: DataProto, size: int) -> tuple[list[DataProto], list[Sequence[int]]]:
        """Micro-batches, and the row numbers of each; every rank has the same number of them.

        With dynamic batching a micro-batch has at most as many tokens as `size` rows of full length, otherwise `size`
        rows; the last may be smaller. W ranks that share their rows take W times as much at once.
        """
        size *= 1 if self.group is None else self.group.size
        if self.fills_by_tokens:
            return prepare_dynamic_batch(
                data, size * data.batch["input_ids"].shape[1], self.packs, self.shares_prompts
            )
        places = [range(start, min(start + size, len(data))) for start in range(0, len(data), size)]
        return [data[rows.start : rows.stop] for rows in places], places

    def _layout(self, rows: DataProto) -> TokenLayout:
        if not self.packs:
            return PaddedLayout(rows)
        return SharedPromptLayout(rows) if self.shares_prompts else PackedLayout(rows, self.group)

    def _inputs(self, rows: DataProto, layout: TokenLayout) -> dict[str, Any]:
        """All keyword arguments of the model's forward, on the device; also counts the forward's operations."""
        media = self._media(rows, layout)
        lengths, prefixes = zip(*layout.pieces(), strict=True)
        self.work += self.counter.count(lengths, int(layout.response_mask.sum()), media, prefixes)
        inputs = {**layout.model_inputs(), **media, "use_cache": False}
        inputs |= media_token_types(self.model.config, inputs["input_ids"])
        return self._on_device(inputs)

    def _media(self, rows: DataProto, layout: TokenLayout, noise: ImageNoise | None = None) -> dict[str, torch.Tensor]:
        """Media inputs in the order of the layout, degraded by `noise` if given."""
        if self.featurizer is None:
            return {}
        media = rows.non_tensor_batch["multi_modal_data"]
        return self.featurizer.featurize([media[row] for row in layout.prompt_rows()], noise)

    def _on_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {
            name: to_device(value, self.device) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }

    def _adapters(self) -> AbstractContextManager:
        return without_adapters(self.model) if self.is_base else nullcontext()

    @abstractmethod
    def _head(
        self, rows: DataProto, layout: TokenLayout, inputs: dict[str, Any], names: Sequence[str]
    ) -> Callable[[LazyLogits], torch.Tensor]:
        """The replacement of the output head: from the logits that predict the labels to (L, K), one column per name.

        Further forwards (of a reference) run here, before the tap, since they may share the model's layers.
        """

    @contextmanager
    def _tap(self, rows: DataProto, layout: TokenLayout, wanted: Collection[str]) -> Iterator[dict[str, Column]]:
        """A context around the forward; afterwards the mapping has the observed streams."""
        yield {}


def _joined(parts: Sequence[Column]) -> Column:
    """On the CPU."""
    return torch.cat(parts).cpu() if isinstance(parts[0], torch.Tensor) else np.concatenate(parts)
