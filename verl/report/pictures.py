# SPDX-License-Identifier: Apache-2.0
"""Embeds pictures in a page as `data:` URIs, shrunk if needed."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image

TOTAL_BYTES = 900_000
"""Bytes of all pictures of a page, before base64 adds a third."""

LARGEST_BYTES = 60_000
"""Largest size of one picture in bytes, before base64."""

LONGEST_SIDE, SHORTEST_SIDE = 512, 32
"""In pixels; a picture is made smaller step by step until it is small enough."""


def picture_uris(images: Sequence[Image.Image]) -> list[str]:
    """`data:` URIs of all pictures of a page, which share `TOTAL_BYTES`.

    Args:
        images: in RGB.
    """
    allowed = min(LARGEST_BYTES, TOTAL_BYTES // max(1, len(images)))
    return [_uri(image, allowed) for image in images]


def _uri(image: Image.Image, allowed: int) -> str:
    side = min(LONGEST_SIDE, max(image.size))
    while True:
        shrunk = image.copy()
        shrunk.thumbnail((side, side), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        shrunk.save(file, "JPEG", quality=80)
        if file.tell() <= allowed or side <= SHORTEST_SIDE:
            return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
        side = max(SHORTEST_SIDE, side * 4 // 5)
