# SPDX-License-Identifier: Apache-2.0
"""Where the tokens of an image lie on it, so that what they are given can be drawn over the picture.

Each function takes the config of a model, what its processor makes of one image, how many tokens the image has, and
the picture's (width, height), and returns the grid of those tokens.

Shapes: T response tokens, V tokens of one image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PretrainedConfig


@dataclass(frozen=True)
class TokenGrid:
    """Tiles of `rows` x `columns` tokens, row by row, which lie in `tile_rows` x `tile_columns` over the picture."""

    rows: int
    columns: int
    tile_rows: int = 1
    tile_columns: int = 1
    has_overview: bool = False
    """Whether one more tile, the last, shows the whole picture."""

    @property
    def num_tokens(self) -> int:
        """V."""
        return self.rows * self.columns * (self.tile_rows * self.tile_columns + self.has_overview)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns over the whole picture."""
        return self.tile_rows * self.rows, self.tile_columns * self.columns

    def lay_out(self, values: np.ndarray) -> np.ndarray:
        """(T, *shape), the sums unchanged, from (T, V) in the order of the tokens.

        What lies on the overview is spread evenly over the fields that each of its tokens covers.
        """
        assert values.shape[1] == self.num_tokens, f"{values.shape[1]} values for {self}"
        tiles = values.reshape(len(values), -1, self.rows, self.columns)
        own = tiles[:, : self.tile_rows * self.tile_columns]
        own = own.reshape(len(values), self.tile_rows, self.tile_columns, self.rows, self.columns)
        laid_out = own.transpose(0, 1, 3, 2, 4).reshape(len(values), *self.shape)
        if not self.has_overview:
            return laid_out
        spread = tiles[:, -1].repeat(self.tile_rows, axis=1).repeat(self.tile_columns, axis=2)
        return laid_out + spread / (self.tile_rows * self.tile_columns)


def grid_of_patches(
    model_config: PretrainedConfig, features: Mapping[str, torch.Tensor], num_tokens: int, size: tuple[int, int]
) -> TokenGrid:
    """For a tower that takes patches and their grid, and merges squares of them."""
    _, height, width = features["image_grid_thw"][0].tolist()
    side = model_config.vision_config.spatial_merge_size
    return TokenGrid(height // side, width // side)


def grid_of_sized_image(
    model_config: PretrainedConfig, features: Mapping[str, torch.Tensor], num_tokens: int, size: tuple[int, int]
) -> TokenGrid:
    """For a tower that takes images of any size and is told it."""
    height, width = features["image_sizes"][0].tolist()
    side = model_config.vision_config.patch_size * model_config.spatial_merge_size
    return TokenGrid(height // side, width // side)


def grid_of_tiles(
    model_config: PretrainedConfig, features: Mapping[str, torch.Tensor], num_tokens: int, size: tuple[int, int]
) -> TokenGrid:
    """For a tower that takes square tiles: one of the whole picture, after those of its parts if there are any.

    Of all ways to lay so many tiles the processor took the one whose shape is nearest to the picture's.
    """
    num_tiles = len(features["pixel_values"])
    side = math.isqrt(num_tokens // num_tiles)
    if num_tiles == 1:
        return TokenGrid(side, side)
    num_parts = num_tiles - 1
    ways = [(num_parts // columns, columns) for columns in range(1, num_parts + 1) if num_parts % columns == 0]
    tile_rows, tile_columns = min(ways, key=lambda way: abs(way[1] / way[0] - size[0] / size[1]))
    return TokenGrid(side, side, tile_rows, tile_columns, has_overview=True)
