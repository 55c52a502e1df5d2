# SPDX-License-Identifier: Apache-2.0
"""Opens and resizes images, and passes images and videos (opened by video.py) on by reference.

The dataset opens and resizes an image or video once. From then on it is passed as a `MediaHandle`, and `Featurizer`
(features.py) turns it into model inputs. So prompt and model agree on its number of tokens. The reward process uses
handles too, so this file does not load torch.
"""

from __future__ import annotations

import io
import math
import os
import struct
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from PIL import ExifTags, Image, ImageOps

from verl.data.media_files import media_content

if TYPE_CHECKING:
    from verl.data.video import Video

    Medium = Image.Image | Video

ImageSource = Image.Image | bytes | Mapping[str, Any] | str | os.PathLike

UNREADABLE_IMAGE = (OSError, SyntaxError, ValueError, RuntimeError, struct.error, Image.DecompressionBombError)
"""Errors of opening or decoding a broken image.

Pillow raises SyntaxError for damaged PNG files, RuntimeError for AVIF, its subclass NotImplementedError for DDS and
BLP, and struct.error for Exif data that is cut off.
"""

MAX_IMAGE_PIXELS = 89_478_485
"""Largest image that is decoded, 256 MiB as RGB. Above it, Pillow only warns of a decompression bomb."""

PROGRAMS = ("EPS",)
"""Formats that Pillow decodes by running another program, which can be abused (Ghostscript for PostScript)."""

GREY_STEPS = {"L;2": 85, "L;4": 17}
"""Pillow's names of greys below 8 bits, and the step between two of their levels as 8 bits."""

UPRIGHT = 1  # the Exif orientation that needs no rotation


def open_image(source: ImageSource, image_dir: str | os.PathLike | None = None) -> Image.Image:
    """Open an image in any form that datasets use, rotated according to its Exif data.

    Pixels are decoded later, on first use, unless the image must be rotated.

    Args:
        source: a PIL image, the bytes of an image file, a path, a `data:` or `file://` URI, or a dict with one of
            these under `bytes`, `path` or `image`.
        image_dir: start of relative paths, which no path may leave; None is the working directory, and allows any
            path.

    Raises:
        ValueError: `source` is none of these, is no regular file, or has more than `MAX_IMAGE_PIXELS`.
        OSError: the file does not exist or is no image.
    """
    if isinstance(source, Mapping):
        source = next((source[key] for key in ("bytes", "path", "image") if source.get(key) is not None), None)
    if isinstance(source, (str, os.PathLike)):
        source = media_content(source, image_dir)
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, (bytes, str)):
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        _scale_transparent_colour(image)
    else:
        raise ValueError(
            f"an image has to be a PIL image, bytes, a path, or a dict with 'bytes' or 'path', not {source!r:.80}"
        )
    _require_decodable(image)
    # Pillow decodes all pixels before it rotates an image.
    if _orientation(image) != UPRIGHT:
        image = ImageOps.exif_transpose(image)
    return image


def _orientation(image: Image.Image) -> int:
    """The Exif orientation, from Exif data or XMP before the pixels."""
    # The method of PNG images decodes all pixels to find Exif data behind them; the one of all images does not.
    exif = Image.Image.getexif(image) if image.format == "PNG" else image.getexif()
    return exif.get(ExifTags.Base.Orientation, UPRIGHT)


def _scale_transparent_colour(image: Image.Image) -> None:
    """Scale the transparent colour of a PNG that was just opened to 8 bits, as Pillow scales its pixels."""
    transparent = image.info.get("transparency")
    if transparent is None or image.format != "PNG" or not image.tile:
        return
    depth = image.tile[0].args
    if depth == "RGB;16B":
        image.info["transparency"] = tuple(level >> 8 for level in transparent)
    elif depth in GREY_STEPS:
        image.info["transparency"] = transparent * GREY_STEPS[depth]


def _require_decodable(image: Image.Image) -> None:
    """Raise for an image whose decoding would run a program or fill the memory."""
    if image.format in PROGRAMS:
        raise ValueError(f"{image.format} files are programs, which decoding would run; save it as PNG")
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"it has {width} x {height} pixels and may be a decompression bomb: more than {MAX_IMAGE_PIXELS} are not "
            "decoded; save it smaller"
        )


def target_size(width: int, height: int, min_pixels: int | None, max_pixels: int | None) -> tuple[int, int]:
    """Return the (width, height) after `process_image`: the same aspect ratio, and an area within the bounds, up to
    rounding down to whole pixels."""
    if max_pixels is not None and width * height > max_pixels:
        factor = math.sqrt(max_pixels / (width * height))
        width, height = max(1, int(width * factor)), max(1, int(height * factor))
    if min_pixels is not None and width * height < min_pixels:
        factor = math.sqrt(min_pixels / (width * height))
        width, height = int(width * factor), int(height * factor)
    return width, height


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image to 8-bit RGB.

    - Transparency (RGBA, LA, PA, and palettes, greys or RGB with a transparent colour) is laid on white.
    - 16-bit greys (I;16, and PNG's in mode I) are scaled from 0..65535 to 0..255; a transparent level becomes white.
    - Other 32-bit integers (I) and floats (F) do not define black and white, and are refused.
    - Pillow converts the modes that it handles correctly (1, L, P, CMYK, YCbCr, HSV).

    Raises:
        ValueError: the mode cannot be converted; the message names it.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        levels = np.asarray(image)
        grey = (levels.astype(np.float64) * (255 / 65535)).round().astype(np.uint8)
        # Pillow compares the transparent level, of 16 bits, with levels that it cut off at 255.
        transparent = image.info.get("transparency")
        if transparent is not None:
            grey[levels == transparent] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        on_white = Image.new("RGBA", rgba.size, "white")
        on_white.alpha_composite(rgba)
        return on_white.convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise ValueError(
            f"image mode {image.mode} ({kind}) does not say what black and white are; save it as 8 or 16 bit"
        )
    return image.convert("RGB")


def process_image(image: Image.Image, min_pixels: int | None, max_pixels: int | None) -> Image.Image:
    """Decode an image (`to_rgb`) and bring its area within `min_pixels` and `max_pixels`; None sets no bound."""
    image = to_rgb(image)
    size = target_size(*image.size, min_pixels, max_pixels)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


class MediaHandle:
    """A reference to one image or video of a prompt. Copies of a handle are equal, and cheap to send.

    The n samples of a prompt share one handle, so the content is sent once per machine and its features are computed
    once per step. Without Ray, a handle holds the content itself.
    """

    def __init__(self, key: str, reference: ray.ObjectRef | None, medium: Medium | None, is_video: bool) -> None:
        self._key = key
        self._reference = reference
        self._medium = medium
        self.is_video = is_video

    @classmethod
    def put(cls, medium: Medium) -> MediaHandle:
        """Store an RGB image (from `process_image`) or a video (from `load_video`) in Ray's object store and return a
        handle to it."""
        is_video = not isinstance(medium, Image.Image)
        assert is_video or medium.mode == "RGB", f"images are stored as RGB, not {medium.mode}"
        key = uuid.uuid4().hex
        if ray.is_initialized():
            # As an array: readers on the same machine share its memory.
            return cls(key, ray.put(medium if is_video else np.asarray(medium)), None, is_video)
        return cls(key, None, medium, is_video)

    def load(self) -> Medium:
        """Return the image or video."""
        if self._reference is None:
            return self._medium
        stored = ray.get(self._reference)
        return stored if self.is_video else Image.fromarray(stored)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MediaHandle) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"MediaHandle({self._key[:8]})"
