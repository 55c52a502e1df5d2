# SPDX-License-Identifier: Apache-2.0
"""Maps values per image token, such as attention, onto the images of a prompt.

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
    """Values of each response token on the fields of one image."""

    values: np.ndarray
    """(T, rows, columns)."""
    box: tuple[float, float, float, float]
    """Left, top, right and bottom of the part that the model sees, as shares of the image's width and height."""


class ImageGrids:
    """Positions of image tokens on images, for one model.

    Args:
        processor: the model's processor.
        model_config: the model's config.
    """

    def __init__(self, processor: ProcessorMixin, model_config: PretrainedConfig) -> None:
        self.processor = processor
        self.model_config = model_config
        self._grids: dict[tuple[int, int], TokenGrid] = {}  # by (width, height)

    def grid(self, size: tuple[int, int]) -> TokenGrid:
        """The token grid of an image of this (width, height), as given to the processor."""
        if size not in self._grids:
            blank = Image.new("RGB", size)
            inputs = self.processor(text=[self.processor.image_token], images=[blank], return_tensors="pt")
            num_tokens = int((inputs["input_ids"] == media_token_ids(self.model_config)[0]).sum())
            grid = family_of(self.model_config).token_grid(self.model_config, inputs, num_tokens, size)
            assert grid.num_tokens == num_tokens, f"{num_tokens} tokens of an image of {size} are not {grid}"
            self._grids[size] = grid
        return self._grids[size]

    def lay_out(self, vision: np.ndarray, images: Sequence[Image.Image]) -> list[PictureMap]:
        """The maps of a prompt's images, from (T, V) values on their tokens in prompt order.

        Args:
            images: the prompt's images, as given to the processor; the prompt must have no videos.

        Raises:
            ValueError: the number of tokens does not fit the images.
        """
        grids = [self.grid(image.size) for image in images]
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
        """The part of the image that the model sees: the whole, unless the processor crops the centre."""
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
