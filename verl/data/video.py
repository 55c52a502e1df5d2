# SPDX-License-Identifier: Apache-2.0
"""Opens videos: which frames of one are shown to a model, of what size, and their pixels.

A video is a file, of which frames are sampled, or a list of frames, which are all shown. Files are read with PyAV,
which is imported when one is opened.

Shapes: T frames of a video that are shown, H by W pixels each.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from verl.data.vision import ImageSource, open_image, process_image, target_size

if TYPE_CHECKING:
    import av

VideoSource = Sequence[ImageSource] | bytes | Mapping[str, Any] | str | os.PathLike

MIN_FRAMES, MAX_FRAMES = 4, 768
MAX_FRAME_PIXELS = 768 * 28 * 28
"""Bounds of Qwen's own sampler: https://github.com/QwenLM/Qwen2.5-VL/tree/main/qwen-vl-utils"""


@dataclass(frozen=True)
class VideoLimits:
    """How much of a video a model is shown."""

    fps: float
    """Frames of a second of a file that are shown, and at which lists of frames were taken."""
    min_pixels: int | None
    max_pixels: int | None
    """Bounds of a frame's area, of which the upper is never above `MAX_FRAME_PIXELS`; None for that alone."""

    def frame_size(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) that a frame is resized to, its shape kept."""
        most = MAX_FRAME_PIXELS if self.max_pixels is None else min(self.max_pixels, MAX_FRAME_PIXELS)
        least = None if self.min_pixels is None else min(self.min_pixels, most)
        return target_size(width, height, least, most)


@dataclass(frozen=True)
class VideoOutline:
    """All that a processor has to know of a video to count its tokens."""

    frame_indices: tuple[int, ...]
    """Which of the source's frames are shown, T of them in order."""
    total_frames: int
    """Of the source."""
    source_fps: float
    """Frames per second of the source."""
    frame_size: tuple[int, int]
    """(width, height) of a frame as it is shown."""

    @property
    def metadata(self) -> dict[str, Any]:
        """The same as transformers' processors take it."""
        width, height = self.frame_size
        return {
            "total_num_frames": self.total_frames,
            "fps": self.source_fps,
            "duration": self.total_frames / self.source_fps,
            "frames_indices": list(self.frame_indices),
            "width": width,
            "height": height,
        }


@dataclass(frozen=True)
class Video:
    """The frames of a video that are shown, resized."""

    outline: VideoOutline
    frames: np.ndarray
    """(T, H, W, 3) uint8, RGB."""


def sample_frames(total_frames: int, source_fps: float, fps: float) -> tuple[int, ...]:
    """Indices of the frames that are shown: `fps` for each second, spread evenly from the first to the last.

    An even number of them (towers take two frames at a time) between `MIN_FRAMES` and `MAX_FRAMES`, unless the video
    has fewer; then all, and a single one twice.
    """
    if total_frames == 1:
        return (0, 0)
    wanted = int(total_frames / source_fps * fps)
    wanted = min(max(wanted, MIN_FRAMES), MAX_FRAMES) // 2 * 2
    if wanted >= total_frames:
        return tuple(range(total_frames))
    return tuple(np.linspace(0, total_frames - 1, wanted).round().astype(int).tolist())


def outline_video(source: VideoSource, video_dir: str | os.PathLike | None, limits: VideoLimits) -> VideoOutline:
    """What `load_video` will give, from headers and the first frame of a file, which knows how the camera was held.

    Args:
        source: a path, the bytes of a video file, a dict with either under `path` or `bytes`, or a list of frames in
            any form that `open_image` takes.
        video_dir: the folder that relative paths start from; None for the working directory.

    Raises:
        ValueError: `source` is none of these, or no video that can be read.
        OSError: a frame of a list cannot be opened.
        ImportError: PyAV is not installed.
    """
    source = _unwrapped(source)
    if _is_list_of_frames(source):
        if not source:
            raise ValueError("a list of frames is empty")
        size = open_image(source[0], video_dir).size
        frames = range(len(source)) if len(source) > 1 else (0, 0)
        return VideoOutline(tuple(frames), len(source), limits.fps, limits.frame_size(*size))
    with _opened(source, video_dir) as container:
        return _outline_of_file(container, limits)


def load_video(source: VideoSource, video_dir: str | os.PathLike | None, limits: VideoLimits) -> Video:
    """Decode the frames that are shown and bring them to their size. Arguments and errors as `outline_video`."""
    source = _unwrapped(source)
    outline = outline_video(source, video_dir, limits)
    width, height = outline.frame_size
    frames = np.empty((len(outline.frame_indices), height, width, 3), dtype=np.uint8)
    if _is_list_of_frames(source):
        for place, index in enumerate(outline.frame_indices):
            frames[place] = _resized(open_image(source[index], video_dir), outline)
    else:
        with _opened(source, video_dir) as container:
            for place, image in enumerate(_decoded(container, outline)):
                frames[place] = _resized(image, outline)
    return Video(outline, frames)


def _unwrapped(source: VideoSource) -> Any:
    if isinstance(source, Mapping):
        return source.get("path") if source.get("bytes") is None else source["bytes"]
    return source


def _is_list_of_frames(source: Any) -> bool:
    return isinstance(source, (list, tuple))


def _resized(image: Image.Image, outline: VideoOutline) -> np.ndarray:
    """(H, W, 3) uint8. All frames get the size of the first, whatever theirs is."""
    image = process_image(image, None, None)
    return np.asarray(image if image.size == outline.frame_size else image.resize(outline.frame_size))


@contextmanager
def _opened(source: Any, video_dir: str | os.PathLike | None) -> Iterator[av.container.InputContainer]:
    if isinstance(source, bytes):
        file: Any = io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        file = os.path.join(video_dir or "", source)
    else:
        raise ValueError(
            f"a video has to be a path, bytes, a dict with 'bytes' or 'path', or a list of frames, not {source!r:.80}"
        )
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"video files are read with PyAV, which cannot be imported ({error}); run `pip install -r "
            "requirements.txt`, or give each video as a list of frames"
        ) from error
    try:
        with av.open(file) as container:
            if not container.streams.video:
                raise ValueError("the file has no video stream")
            yield container
    except av.error.FFmpegError as error:
        raise ValueError(f"FFmpeg cannot read the file: {error}") from error


def _outline_of_file(container: av.container.InputContainer, limits: VideoLimits) -> VideoOutline:
    stream = container.streams.video[0]
    # Containers such as WebM do not say how many frames they hold; each packet of a video stream is one.
    total = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    source_fps = float(stream.average_rate or stream.guessed_rate or 0)
    if total == 0 or source_fps == 0:
        raise ValueError(f"the file has {total} frames, {source_fps} a second")
    return VideoOutline(
        sample_frames(total, source_fps, limits.fps),
        total,
        source_fps,
        limits.frame_size(*_upright_size(container)),
    )


def _upright_size(container: av.container.InputContainer) -> tuple[int, int]:
    """(width, height) of the file's frames as they are to be seen."""
    container.seek(0)
    frame = next(container.decode(video=0), None)
    if frame is None:
        raise ValueError("no frame of the file can be decoded")
    return (frame.height, frame.width) if frame.rotation % 180 else (frame.width, frame.height)


def _decoded(container: av.container.InputContainer, outline: VideoOutline) -> Iterator[Image.Image]:
    """The frames that are shown, upright. Those that a file lacks at its end are the last one before, once more."""
    wanted = list(outline.frame_indices)
    image = None
    for position, frame in enumerate(container.decode(video=0)):
        if position == wanted[0]:
            image = frame.to_image().rotate(frame.rotation, expand=True)
        while wanted and position == wanted[0]:
            wanted.pop(0)
            yield image
        if not wanted:
            return
    for _ in wanted:
        yield image
