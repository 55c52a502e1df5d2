# SPDX-License-Identifier: Apache-2.0
"""Positions of image tokens on the image, so that values per token can be drawn over it.

Each function takes a model's config, the processor's output for one image, the image's number of tokens and its
(width, height), and returns the grid of the tokens.

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
    """`tile_rows` x `tile_columns` tiles over the image, each with `rows` x `columns` tokens in row-major order."""

    rows: int
    columns: int
    tile_rows: int = 1
    tile_columns: int = 1
    has_overview: bool = False
    """Whether a further tile, the last, shows the whole image."""

    @property
    def num_tokens(self) -> int:
        """V."""
        return self.rows * self.columns * (self.tile_rows * self.tile_columns + self.has_overview)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns over the whole image."""
        return self.tile_rows * self.rows, self.tile_columns * self.columns

    def lay_out(self, values: np.ndarray) -> np.ndarray:
        """(T, *shape) from (T, V) in token order, with the same sums.

        The value of each overview token is spread evenly over the fields that the token covers.
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
    """For a tower that takes patches and their grid, and merges squares of patches."""
    _, height, width = features["image_grid_thw"][0].tolist()
    side = model_config.vision_config.spatial_merge_size
    return TokenGrid(height // side, width // side)


def grid_of_sized_image(
    model_config: PretrainedConfig, features: Mapping[str, torch.Tensor], num_tokens: int, size: tuple[int, int]
) -> TokenGrid:
    """For a tower that takes images of any size, with the size as an input."""
    height, width = features["image_sizes"][0].tolist()
    side = model_config.vision_config.patch_size * model_config.spatial_merge_size
    return TokenGrid(height // side, width // side)


def grid_of_tiles(
    model_config: PretrainedConfig, features: Mapping[str, torch.Tensor], num_tokens: int, size: tuple[int, int]
) -> TokenGrid:
    """For a tower that takes square tiles: the tiles of the image's parts, if any, then one of the whole image.

    Among the layouts with this many tiles, the processor uses the one closest to the image's aspect ratio.
    """
    num_tiles = len(features["pixel_values"])
    side = math.isqrt(num_tokens // num_tiles)
    if num_tiles == 1:
        return TokenGrid(side, side)
    num_parts = num_tiles - 1
    ways = [(num_parts // columns, columns) for columns in range(1, num_parts + 1) if num_parts % columns == 0]
    tile_rows, tile_columns = min(ways, key=lambda way: abs(way[1] / way[0] - size[0] / size[1]))
    return TokenGrid(side, side, tile_rows, tile_columns, has_overview=True)
