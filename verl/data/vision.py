# SPDX-License-Identifier: Apache-2.0
"""Opens and resizes images, and makes a model's inputs of images and videos (which video.py opens).

The dataset opens and resizes a medium once; from there on it travels by reference (`MediaHandle`), and whoever needs
model inputs makes them with `featurize`. Prompt and model thus agree on the number of its tokens.
"""

from __future__ import annotations

import io
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from PIL import ExifTags, Image, ImageOps
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from verl.data.video import Video

    Medium = Image.Image | Video

ImageSource = Image.Image | bytes | Mapping[str, Any] | str | os.PathLike

UNREADABLE_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What opening or decoding a broken image raises; Pillow uses SyntaxError for damaged PNG files."""

TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
"""Of a processor's outputs, those with one number for each token."""

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


class MediaHandle:
    """One image or video of a prompt by reference: small to send, equal to every copy of itself.

    The n samples of a prompt share one handle, so the medium crosses the network once a machine and its features are
    computed once a micro-batch. Where Ray is not running, a handle holds the medium itself.
    """

    def __init__(self, key: str, reference: ray.ObjectRef | None, medium: Medium | None, is_video: bool) -> None:
        self._key = key
        self._reference = reference
        self._medium = medium
        self.is_video = is_video

    @classmethod
    def put(cls, medium: Medium) -> MediaHandle:
        """Store an RGB image (as `process_image` returns it) or a video (as `load_video` does) in Ray's object store
        and return a handle to it."""
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


def featurize(
    media: Sequence[Sequence[MediaHandle] | None], processor: ProcessorMixin | None
) -> dict[str, torch.Tensor]:
    """Make the model's media inputs for a micro-batch: features of all its images and videos, in row order.

    Args:
        media: the images and videos of each row; None or empty for a row without.
        processor: that of the model, with the settings the dataset counted tokens with; None for text models.

    Returns:
        What the processor makes of images (for Qwen-VL `pixel_values` (patches, patch size) float32 and
        `image_grid_thw` (images, 3) int64; for families with tiles `pixel_values` (tiles, 3, height, width)) and of
        videos (`pixel_values_videos`, `video_grid_thw`, ...); empty when no row has any. Each distinct handle is
        processed once and its features repeated.
    """
    handles = [handle for row in media if row is not None for handle in row]
    if processor is None or not handles:
        return {}
    features = {handle: _features_of(handle, processor) for handle in dict.fromkeys(handles)}
    joined: dict[str, list[torch.Tensor]] = {}
    for handle in handles:
        for name, value in features[handle].items():
            joined.setdefault(name, []).append(value)
    return {name: _join(values) for name, values in joined.items()}


def _features_of(handle: MediaHandle, processor: ProcessorMixin) -> dict[str, torch.Tensor]:
    """What the processor adds to a prompt of nothing but this medium's placeholder."""
    medium = handle.load()
    if handle.is_video:
        inputs = processor(
            text=[processor.video_token],
            videos=[medium.frames.copy()],  # what the store hands out is read-only, of which PyTorch warns
            video_metadata=[medium.outline.metadata],
            do_sample_frames=False,
            return_tensors="pt",
        )
    else:
        inputs = processor(text=[processor.image_token], images=[medium], return_tensors="pt")
    return {name: value for name, value in inputs.items() if name not in TEXT_INPUTS}


def _join(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Along the first dimension. Images of different sizes get zeros on the right and at the bottom, as Pixtral pads
    them; their true sizes are an input of their own."""
    if any(value.shape[1:] != values[0].shape[1:] for value in values):
        height, width = (max(value.shape[dim] for value in values) for dim in (2, 3))
        values = [functional.pad(value, (0, width - value.shape[3], 0, height - value.shape[2])) for value in values]
    return torch.cat(list(values))
