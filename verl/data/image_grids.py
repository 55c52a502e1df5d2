# SPDX-License-Identifier: Apache-2.0
"""Lays what a response gives to the image tokens of its prompt over the pictures that they stand for.

Shapes: T response tokens, V image tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from transformers import PretrainedConfig

from verl.models.registry import family_of, media_token_ids
from verl.models.token_grid import TokenGrid

if TYPE_CHECKING:
    from transformers import ProcessorMixin


@dataclass(frozen=True)
class PictureMap:
    """What each response token gives to the fields of one picture."""

    values: np.ndarray
    """(T, rows, columns)."""
    box: tuple[float, float, float, float]
    """Left, top, right and bottom of what the model sees of the picture, as shares of its width and height."""


class ImageGrids:
    """Knows where the image tokens of a model lie.

    Args:
        processor: of the model.
        model_config: of the model.
    """

    def __init__(self, processor: ProcessorMixin, model_config: PretrainedConfig) -> None:
        self.processor = processor
        self.model_config = model_config
        self._grids: dict[tuple[int, int], TokenGrid] = {}  # by (width, height)

    def of(self, size: tuple[int, int]) -> TokenGrid:
        """The grid of an image of this (width, height), as it enters the processor."""
        if size not in self._grids:
            blank = Image.new("RGB", size)
            inputs = self.processor(text=[self.processor.image_token], images=[blank], return_tensors="pt")
            num_tokens = int((inputs["input_ids"] == media_token_ids(self.model_config)[0]).sum())
            grid = family_of(self.model_config).token_grid(self.model_config, inputs, num_tokens, size)
            assert grid.num_tokens == num_tokens, f"{num_tokens} tokens of an image of {size} are not {grid}"
            self._grids[size] = grid
        return self._grids[size]

    def lay_out(self, vision: np.ndarray, images: Sequence[Image.Image]) -> list[PictureMap]:
        """The maps of a prompt's images, from (T, V) over their tokens in the order of the prompt.

        Args:
            images: of the prompt, as they enter the processor, and no video beside them.

        Raises:
            ValueError: there are more or fewer tokens than those of the images.
        """
        grids = [self.of(image.size) for image in images]
        expected = sum(grid.num_tokens for grid in grids)
        if vision.shape[1] != expected:
            raise ValueError(
                f"{len(images)} images have {expected} tokens, but {vision.shape[1]} are given; maps of prompts with "
                "videos cannot be laid out"
            )
        ends = np.cumsum([grid.num_tokens for grid in grids])
        parts = np.split(vision, ends[:-1], axis=1) if grids else []
        return [
            PictureMap(grid.lay_out(part), self._seen_box(image.size))
            for grid, part, image in zip(grids, parts, images, strict=True)
        ]

    def _seen_box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """All of the picture, but for a processor that cuts out its middle once its shorter side has some length."""
        image_processor = self.processor.image_processor
        edge = getattr(getattr(image_processor, "size", None), "shortest_edge", None)
        if not getattr(image_processor, "do_center_crop", False) or edge is None:
            return 0.0, 0.0, 1.0, 1.0
        crop = image_processor.crop_size
        scale = edge / min(size)
        width, height = (
            min(1.0, kept / (scale * length)) for kept, length in zip((crop.width, crop.height), size, strict=True)
        )
        return (1 - width) / 2, (1 - height) / 2, (1 + width) / 2, (1 + height) / 2
