# SPDX-License-Identifier: Apache-2.0
"""The only place that opens and resizes media.

The dataset opens and resizes an image once; from there on the resized image travels by reference (`MediaHandle`), and
whoever needs model inputs makes them with `featurize`. Prompt and model thus agree on the number of image tokens.
"""

from __future__ import annotations

import io
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch
from PIL import ExifTags, Image, ImageOps
from transformers import BaseImageProcessor

ImageSource = Image.Image | bytes | Mapping[str, Any] | str | os.PathLike

UNREADABLE_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What opening or decoding a broken image raises; Pillow uses SyntaxError for damaged PNG files."""

UPRIGHT = 1  # the orientation of the Exif standard that needs no turning


def open_image(source: ImageSource, image_dir: str | os.PathLike | None = None) -> Image.Image:
    """Open an image in any of the forms in which datasets hold them, turned upright if the camera says so.

    Pixels are decoded later, on first use, except where the image has to be turned.

    Args:
        source: a PIL image, the bytes of an image file, a path, or a dict with either under `bytes` or `path`.
        image_dir: the folder that relative paths start from; None for the working directory.

    Raises:
        ValueError: `source` is none of these.
        OSError: no such file, or not an image.
    """
    if isinstance(source, Mapping):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, bytes):
        image = Image.open(io.BytesIO(source))
    elif isinstance(source, (str, os.PathLike)):
        image = Image.open(os.path.join(image_dir or "", source))
    else:
        raise ValueError(
            f"an image has to be a PIL image, bytes, a path, or a dict with 'bytes' or 'path', not {source!r:.80}"
        )
    # Pillow decodes all pixels before it turns an image, and a PNG's even before it looks for an orientation.
    may_be_turned = image.format != "PNG" or "exif" in image.info
    if may_be_turned and image.getexif().get(ExifTags.Base.Orientation, UPRIGHT) != UPRIGHT:
        image = ImageOps.exif_transpose(image)
    return image


def target_size(width: int, height: int, min_pixels: int | None, max_pixels: int | None) -> tuple[int, int]:
    """Return the (width, height) that `process_image` gives an image: its shape kept, its area
    within the bounds up to rounding down to whole pixels."""
    if max_pixels is not None and width * height > max_pixels:
        factor = math.sqrt(max_pixels / (width * height))
        width, height = max(1, int(width * factor)), max(1, int(height * factor))
    if min_pixels is not None and width * height < min_pixels:
        factor = math.sqrt(min_pixels / (width * height))
        width, height = int(width * factor), int(height * factor)
    return width, height


def process_image(image: Image.Image, min_pixels: int | None, max_pixels: int | None) -> Image.Image:
    """Decode an image, make it RGB and bring its area within `min_pixels` and `max_pixels`; None sets no bound."""
    image = image.convert("RGB")
    size = target_size(*image.size, min_pixels, max_pixels)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def image_token_count(size: tuple[int, int], image_processor: BaseImageProcessor) -> int:
    """Return how many tokens of the prompt an image of `size` (width, height) takes, from its size alone."""
    width, height = size
    return image_processor.get_number_of_image_patches(height, width) // image_processor.merge_size**2


class MediaHandle:
    """One prompt image by reference: small to send, equal to every copy of itself.

    The n samples of a prompt share one handle, so the image crosses the network once a machine and its features are
    computed once a micro-batch. Where Ray is not running, a handle holds the image itself.
    """

    def __init__(self, key: str, reference: ray.ObjectRef | None, image: Image.Image | None) -> None:
        self._key = key
        self._reference = reference
        self._image = image

    @classmethod
    def put(cls, image: Image.Image) -> MediaHandle:
        """Store an RGB image (as `process_image` returns it) in Ray's object store and return a handle to it."""
        assert image.mode == "RGB", f"images are stored as RGB, not {image.mode}"
        key = uuid.uuid4().hex
        if ray.is_initialized():
            # As an array: readers on the same machine share its memory.
            return cls(key, ray.put(np.asarray(image)), None)
        return cls(key, None, image)

    def load(self) -> Image.Image:
        """Return the image."""
        return self._image if self._reference is None else Image.fromarray(ray.get(self._reference))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MediaHandle) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"MediaHandle({self._key[:8]})"


def featurize(
    media: Sequence[Sequence[MediaHandle] | None], image_processor: BaseImageProcessor
) -> dict[str, torch.Tensor]:
    """Make the model's image inputs for a micro-batch: features of all its images, in row order.

    Args:
        media: the images of each row; None or empty for a row without.
        image_processor: that of the model, with the settings the dataset counted tokens with.

    Returns:
        `pixel_values` (patches, patch size) float32 and `image_grid_thw` (images, 3) int64; empty when no row has
        an image. Each distinct handle is processed once and its features repeated.
    """
    handles = [handle for row in media if row is not None for handle in row]
    if not handles:
        return {}
    place = {handle: index for index, handle in enumerate(dict.fromkeys(handles))}
    features = image_processor(images=[handle.load() for handle in place], return_tensors="pt")
    grids = features["image_grid_thw"]  # (distinct, 3)
    pixels = features["pixel_values"].split(grids.prod(dim=-1).tolist())
    order = [place[handle] for handle in handles]
    return {"pixel_values": torch.cat([pixels[index] for index in order]), "image_grid_thw": grids[order]}
