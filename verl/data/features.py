# SPDX-License-Identifier: Apache-2.0
"""Turns the images and videos of a micro-batch into model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from verl.data.image_noise import ImageNoise
from verl.data.vision import MediaHandle

if TYPE_CHECKING:
    from transformers import ProcessorMixin

TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
"""The outputs of a processor with one number per token."""


class Featurizer:
    """Computes a model's media inputs, and caches the features of single images and videos for later passes of a step.

    Args:
        processor: the model's processor, with the same settings as in the dataset.
        capacity: size of the cache in bytes. When it is full, further media are processed again in each pass. Passes
            visit a step's media in the same order, so replacing the oldest entries would never give a hit.
    """

    def __init__(self, processor: ProcessorMixin, capacity: int = 0) -> None:
        self.processor = processor
        self.capacity = capacity
        self._kept: dict[MediaHandle, dict[str, torch.Tensor]] = {}
        self._num_bytes = 0

    def featurize(
        self, media: Sequence[Sequence[MediaHandle] | None], noise: ImageNoise | None = None
    ) -> dict[str, torch.Tensor]:
        """Make the model's media inputs for a micro-batch: features of all its images and videos, in row order.

        Args:
            media: the images and videos of each row; None or empty for a row without media.
            noise: degrades the images and frames first; None leaves them as they are. Such features are not cached.

        Returns:
            The processor's outputs for images (for Qwen-VL `pixel_values` (patches, patch size) float32 and
            `image_grid_thw` (images, 3) int64; for families with tiles `pixel_values` (tiles, 3, height, width)) and
            of videos (`pixel_values_videos`, `video_grid_thw`, ...); empty when no row has any. Each distinct handle
            is processed once and its features repeated.
        """
        handles = [handle for row in media if row is not None for handle in row]
        features = {handle: self._features_of(handle, noise) for handle in dict.fromkeys(handles)}
        joined: dict[str, list[torch.Tensor]] = {}
        for handle in handles:
            for name, value in features[handle].items():
                joined.setdefault(name, []).append(value)
        return {name: _join(values) for name, values in joined.items()}

    def clear(self) -> None:
        """Drop the cached features."""
        self._kept.clear()
        self._num_bytes = 0

    def _features_of(self, handle: MediaHandle, noise: ImageNoise | None) -> dict[str, torch.Tensor]:
        if noise is not None:
            return _process(handle, self.processor, noise)
        if handle in self._kept:
            return self._kept[handle]
        features = _process(handle, self.processor)
        num_bytes = sum(value.nbytes for value in features.values())
        if self._num_bytes + num_bytes <= self.capacity:
            self._kept[handle] = features
            self._num_bytes += num_bytes
        return features


def _process(
    handle: MediaHandle, processor: ProcessorMixin, noise: ImageNoise | None = None
) -> dict[str, torch.Tensor]:
    """The processor's media outputs for a prompt that consists of one placeholder."""
    medium = handle.load()
    if handle.is_video:
        # Arrays from the store are read-only, and PyTorch would warn about that.
        frames = medium.frames.copy() if noise is None else noise.degrade(medium.frames)
        inputs = processor(
            text=[processor.video_token],
            videos=[frames],
            video_metadata=[medium.outline.metadata],
            do_sample_frames=False,
            return_tensors="pt",
        )
    else:
        image = medium if noise is None else Image.fromarray(noise.degrade(np.asarray(medium)))
        inputs = processor(text=[processor.image_token], images=[image], return_tensors="pt")
    return {name: value for name, value in inputs.items() if name not in TEXT_INPUTS}


def _join(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenates along the first dimension. Images of different sizes get zeros on the right and at the bottom, as
    in Pixtral, which has their true sizes as a further input. A single value is returned without a copy."""
    if len(values) == 1:
        return values[0]
    if any(value.shape[1:] != values[0].shape[1:] for value in values):
        height, width = (max(value.shape[dim] for value in values) for dim in (2, 3))
        values = [functional.pad(value, (0, width - value.shape[3], 0, height - value.shape[2])) for value in values]
    return torch.cat(list(values))
