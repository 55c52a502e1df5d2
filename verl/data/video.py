# SPDX-License-Identifier: Apache-2.0
"""Opens videos: chooses the frames that a model is shown, their size, and decodes them.

A video is a file, from which frames are sampled, or a list of frames, which are all shown. Files are read with PyAV,
which is imported when the first one is opened.

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

from verl.data.media_files import media_content
from verl.data.vision import MAX_IMAGE_PIXELS, ImageSource, open_image, process_image, target_size

if TYPE_CHECKING:
    import av

VideoSource = Sequence[ImageSource] | bytes | Mapping[str, Any] | str | os.PathLike

MIN_FRAMES, MAX_FRAMES = 4, 768
MAX_FRAME_PIXELS = 768 * 28 * 28
"""Bounds of Qwen's own sampler: https://github.com/QwenLM/Qwen2.5-VL/tree/main/qwen-vl-utils"""

MAX_VIDEO_PIXELS = 2**39
"""Largest number of pixels of all frames of a file, since all frames up to the last shown one are decoded: two and a
half hours of 1920 x 1080 at 30 frames a second."""

CONTAINERS = (
    *(
        "mov",
        "matroska",
        "avi",
        "flv",
        "mpeg",
        "mpegts",
        "ogg",
        "asf",
        "gif",
        "apng",
        "mxf",
        "nut",
        "rm",
        "wtv",
        "ivf",
    ),
    *("mpegvideo", "m4v", "h264", "hevc", "vvc", "av1", "obu", "mjpeg", "yuv4mpegpipe"),
)
"""FFmpeg's names of the accepted formats (mov includes MP4, matroska WebM; the second line has streams without a
container). All contain their frames. Playlists (HLS, DASH, concat) and session descriptions, which refer to other
files or addresses, are not accepted."""

OPENING = {
    "format_whitelist": ",".join(CONTAINERS),
    "protocol_whitelist": "none",
    "max_pixels": str(MAX_IMAGE_PIXELS),
}
"""FFmpeg's options for opening a file: open no other files, and decode no giant frame to identify the content."""


@dataclass(frozen=True)
class VideoLimits:
    """How much of a video a model is shown."""

    fps: float
    """Frames per second that are shown of a file; also the assumed frame rate of lists of frames."""
    min_pixels: int | None
    max_pixels: int | None
    """Bounds of a frame's area. The upper bound is at most `MAX_FRAME_PIXELS`, which None stands for."""

    def frame_size(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) to which a frame is resized, with its aspect ratio."""
        most = MAX_FRAME_PIXELS if self.max_pixels is None else min(self.max_pixels, MAX_FRAME_PIXELS)
        least = None if self.min_pixels is None else min(self.min_pixels, most)
        return target_size(width, height, least, most)


@dataclass(frozen=True)
class VideoOutline:
    """The properties of a video from which a processor counts its tokens."""

    frame_indices: tuple[int, ...]
    """Indices in the source of the T frames that are shown, in order."""
    total_frames: int
    """Number of frames of the source."""
    source_fps: float
    """Frames per second of the source."""
    frame_size: tuple[int, int]
    """(width, height) of a resized frame."""

    @property
    def metadata(self) -> dict[str, Any]:
        """The outline in the form that transformers' processors take."""
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
    """The resized frames of a video that are shown."""

    outline: VideoOutline
    frames: np.ndarray
    """(T, H, W, 3) uint8, RGB."""


def sample_frames(total_frames: int, source_fps: float, fps: float) -> tuple[int, ...]:
    """Indices of the frames that are shown: `fps` per second, spread evenly from the first to the last.

    Their number is even (towers take two frames at a time) and between `MIN_FRAMES` and `MAX_FRAMES`. If the video has
    fewer frames, all are shown, and a single one twice.
    """
    if total_frames == 1:
        return (0, 0)
    wanted = int(total_frames / source_fps * fps)
    wanted = min(max(wanted, MIN_FRAMES), MAX_FRAMES) // 2 * 2
    if wanted >= total_frames:
        return tuple(range(total_frames))
    return tuple(np.linspace(0, total_frames - 1, wanted).round().astype(int).tolist())


def outline_video(source: VideoSource, video_dir: str | os.PathLike | None, limits: VideoLimits) -> VideoOutline:
    """The outline of what `load_video` returns, from headers and a file's first frame, which has the rotation.

    Args:
        source: a path or a `file://` or `data:` URI, the bytes of a video file, a dict with one of these under `path`
            or `bytes`, or a list of frames in any form that `open_image` takes.
        video_dir: start of relative paths, which no path may leave; None is the working directory, and allows any
            path.

    Raises:
        ValueError: `source` is none of these, cannot be read as a video, refers to other files, or has more than
            `MAX_VIDEO_PIXELS` in all or `MAX_IMAGE_PIXELS` in a frame.
        OSError: the file does not exist, or a frame of a list cannot be opened.
        ImportError: PyAV is not installed.
    """
    source = _unwrapped(source)
    if _is_list_of_frames(source):
        if not source:
            raise ValueError("a list of frames is empty")
        size = open_image(source[0], video_dir).size
        frames = range(len(source)) if len(source) > 1 else (0, 0)
        width, height = limits.frame_size(*size)
        if len(frames) * width * height > MAX_FRAMES * MAX_FRAME_PIXELS:
            raise ValueError(
                f"{len(frames)} frames are shown of {width} x {height} pixels each, together more than of the longest "
                f"file ({MAX_FRAMES} of {MAX_FRAME_PIXELS}); give fewer, or lower data.max_pixels"
            )
        return VideoOutline(tuple(frames), len(source), limits.fps, (width, height))
    with _opened(source, video_dir) as container:
        return _outline_of_file(container, limits)


def load_video(source: VideoSource, video_dir: str | os.PathLike | None, limits: VideoLimits) -> Video:
    """Decode and resize the frames that are shown. Arguments and errors as in `outline_video`."""
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
    """(H, W, 3) uint8. All frames get the size of the first."""
    image = process_image(image, None, None)
    return np.asarray(image if image.size == outline.frame_size else image.resize(outline.frame_size))


@contextmanager
def _opened(source: Any, video_dir: str | os.PathLike | None) -> Iterator[av.container.InputContainer]:
    if not isinstance(source, (bytes, str, os.PathLike)):
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
    content = source if isinstance(source, bytes) else media_content(source, video_dir)
    # Opened here, so that FFmpeg takes no file name for a protocol such as `concat:` or `subfile:`.
    with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
        try:
            with av.open(file, options=OPENING) as container:
                _require_stream(container)
                yield container
        except av.error.ArgumentError as error:
            raise ValueError(
                f"FFmpeg cannot read the file ({error.strerror}), or it is a playlist, which names other files, or of "
                "another format that is not read as a video"
            ) from error
        except av.error.FFmpegError as error:
            raise ValueError(f"FFmpeg cannot read the file: {error}") from error


def _require_stream(container: av.container.InputContainer) -> None:
    """Raise unless the header names a stream that can be decoded; and enforce the header's frame size."""
    if not container.streams.video:
        raise ValueError("the file has no video stream")
    context = container.streams.video[0].codec_context
    if context is None:
        raise ValueError("there is no decoder for the file's video stream")
    if context.width * context.height > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"its frames have {context.width} x {context.height} pixels and may be a decompression bomb: more than "
            f"{MAX_IMAGE_PIXELS} are not decoded"
        )
    context.options = {**context.options, "max_pixels": str(MAX_IMAGE_PIXELS)}


def _outline_of_file(container: av.container.InputContainer, limits: VideoLimits) -> VideoOutline:
    stream = container.streams.video[0]
    # Containers such as WebM do not store their number of frames; each packet of a video stream is one.
    total = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    source_fps = float(stream.average_rate or stream.guessed_rate or 0)
    if total == 0 or source_fps == 0:
        raise ValueError(f"the file has {total} frames, {source_fps} a second")
    width, height = stream.codec_context.width, stream.codec_context.height
    if total * width * height > MAX_VIDEO_PIXELS:
        raise ValueError(
            f"it has {total} frames of {width} x {height} pixels, more than {MAX_VIDEO_PIXELS:,} in all, which take "
            "hours to decode; cut it, or save it smaller"
        )
    return VideoOutline(
        sample_frames(total, source_fps, limits.fps),
        total,
        source_fps,
        limits.frame_size(*_upright_size(container)),
    )


def _upright_size(container: av.container.InputContainer) -> tuple[int, int]:
    """(width, height) of the file's frames after rotation."""
    container.seek(0)
    frame = next(container.decode(video=0), None)
    if frame is None:
        raise ValueError("no frame of the file can be decoded")
    return (frame.height, frame.width) if frame.rotation % 180 else (frame.width, frame.height)


def _decoded(container: av.container.InputContainer, outline: VideoOutline) -> Iterator[Image.Image]:
    """The frames that are shown, upright. Frames missing at the file's end are replaced by the last one."""
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
