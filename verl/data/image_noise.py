# SPDX-License-Identifier: Apache-2.0
"""Degrades images, to measure what a policy says without them. Sizes and prompt tokens do not change.

Shapes: F frames (1 for an image), H height and W width in pixels.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

PATCH = 14
"""Side in pixels of the squares of `patches`, as in VPPO and PAPO: a patch of Qwen2.5-VL's vision tower."""


@dataclass(frozen=True)
class ImageNoise:
    """How images are degraded. The same image always gets the same noise.

    - `blank`: all black.
    - `patches`: squares of `PATCH` pixels, a share of them, black (VPPO, arXiv 2510.09285; PAPO, arXiv 2507.06448).
    - `gaussian`: with pixels x in [-1, 1], sqrt(1 - share) x + sqrt(share) noise, the noise standard normal (VCD,
      arXiv 2311.16922, in one step); clipped to what a pixel can hold.
    """

    kind: Literal["blank", "patches", "gaussian"]
    share: float
    """Share of black patches, or of the variance that is noise."""

    def degrade(self, pixels: np.ndarray) -> np.ndarray:
        """A degraded copy of (H, W, 3) or (F, H, W, 3) uint8."""
        generator = np.random.default_rng(zlib.crc32(np.ascontiguousarray(pixels).tobytes()))
        return KINDS[self.kind](pixels, self.share, generator)


def _blank(pixels: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    return np.zeros_like(pixels)


def _patches(pixels: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    height, width = pixels.shape[-3:-1]
    rows, columns = math.ceil(height / PATCH), math.ceil(width / PATCH)
    black = np.zeros(rows * columns, dtype=bool)
    black[generator.permutation(black.size)[: round(share * black.size)]] = True
    mask = black.reshape(rows, columns).repeat(PATCH, axis=0).repeat(PATCH, axis=1)[:height, :width]  # (H, W)
    return np.where(mask[..., None], 0, pixels).astype(np.uint8)


def _gaussian(pixels: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    noise = generator.standard_normal(pixels.shape, dtype=np.float32)
    mixed = math.sqrt(1 - share) * (pixels / 127.5 - 1) + math.sqrt(share) * noise
    return ((mixed + 1) * 127.5).round().clip(0, 255).astype(np.uint8)


KINDS: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "blank": _blank,
    "patches": _patches,
    "gaussian": _gaussian,
}
