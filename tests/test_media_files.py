# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_media_files.py
"""What a dataset names cannot lead out of its folder, to the network or to what never ends, nor fill the memory."""

from __future__ import annotations

import os
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from tests.test_video import LIMITS, SIZE, write_frames, write_video
from verl.data.video import load_video, outline_video
from verl.data.vision import MAX_IMAGE_PIXELS, open_image

Opener = Callable[[Any, Path | None], object]


def outline(source: Any, folder: Path | None) -> object:
    return outline_video(source, folder, LIMITS)


def outline_of_frames(source: Any, folder: Path | None) -> object:
    return load_video([source, source], folder, LIMITS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`data.image_dir`, with a picture and a video in it; the same are beside it."""
    (tmp_path / "media").mkdir()
    names = write_frames(tmp_path, 2)
    for place in (tmp_path, tmp_path / "media"):
        Image.open(tmp_path / names[0]).save(place / "a.png")
        write_video(place / "a.avi", [tmp_path / name for name in names], fps=2)
    (tmp_path / "media" / "out").symlink_to(tmp_path)
    (tmp_path / "media" / "in").symlink_to(tmp_path / "media")
    for suffix in ("png", "avi"):
        (tmp_path / "media" / f"link.{suffix}").symlink_to(tmp_path / f"a.{suffix}")
    return tmp_path / "media"


OPENERS = pytest.mark.parametrize(
    ("read", "suffix"),
    [(open_image, "png"), (outline, "avi"), (outline_of_frames, "png")],
    ids=["image", "video", "frames"],
)


@OPENERS
def test_media_stay_below_their_folder_whatever_leads_out_of_it(read: Opener, suffix: str, folder: Path) -> None:
    beside = folder.parent / f"a.{suffix}"
    ways_out = [f"../a.{suffix}", str(beside), beside, f"file://{beside}", f"out/a.{suffix}", f"link.{suffix}"]
    ways_out += [f"in/../a.{suffix}", f"file://{folder}/../a.{suffix}", {"path": str(beside)}]
    for source in ways_out:
        with pytest.raises(ValueError, match=rf"outside of data.image_dir: .* is {beside}"):
            read(source, folder)
        if isinstance(source, str) and source.startswith("file://") or Path(str(source)).is_absolute():
            read(source, None)
    for source in (f"a.{suffix}", f"{folder}/a.{suffix}", f"file://{folder}/a.{suffix}", f"in/a.{suffix}"):
        read(source, folder)


def test_a_folder_that_is_a_link_itself_holds_its_media(folder: Path) -> None:
    (folder.parent / "alias").symlink_to(folder)
    open_image("a.png", folder.parent / "alias")
    (folder.parent / "media2").mkdir()
    Image.open(folder / "a.png").save(folder.parent / "media2" / "a.png")
    with pytest.raises(ValueError, match="outside of data.image_dir"):
        open_image("../media2/a.png", folder)


@OPENERS
def test_what_is_no_regular_file_is_refused_by_its_kind_and_not_waited_for(
    read: Opener, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)  # the name of a socket has a limit
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        for name in ("pipe", "folder", "socket"):
            with pytest.raises(ValueError, match=f"'{name}' is a {name}, not a regular file"):
                read(name, tmp_path)
    with pytest.raises(ValueError, match="'/dev/zero' is a device, not a regular file"):
        read("/dev/zero", None)


# ---- other files, and the network ----


@pytest.fixture
def requests() -> Iterator[tuple[str, list[str]]]:
    """The address of a server on this machine, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("read", [open_image, outline, outline_of_frames])
def test_no_medium_is_fetched(read: Opener, requests: tuple[str, list[str]]) -> None:
    address, asked = requests
    with pytest.raises(ValueError, match=f"media are read from files, not fetched: download '{address}/a.avi'"):
        read(f"{address}/a.avi", None)
    for protocol in ("rtsp", "ftp", "tcp", "HTTPS"):
        with pytest.raises(ValueError, match="not fetched"):
            read(f"{protocol}://127.0.0.1/a.avi", None)
    assert asked == []
    with pytest.raises(av.error.FFmpegError):
        av.open(f"{address}/a.avi")
    assert asked, "FFmpeg would fetch it"


def playlists(target: str) -> dict[str, str]:
    """Files that name another one in the place of frames, by their own name."""
    return {
        "a.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n",
        "a.ffconcat": f"ffconcat version 1.0\nfile '{target}'\n",
        "a.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
    }


@pytest.mark.parametrize("name", playlists(""))
def test_a_video_that_names_other_files_is_refused(name: str, tmp_path: Path) -> None:
    # Noise, since FFmpeg recognises a transport stream by its length.
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
    with av.open(str(tmp_path / "a.ts"), "w") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode())
    content = playlists("a.ts")[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(
        ValueError, match="FFmpeg cannot read the file .* or it is a playlist, which names other files"
    ):
        outline_video(name, tmp_path, LIMITS)
    for source in (content.encode(), {"bytes": content.encode()}):
        with pytest.raises(ValueError, match="FFmpeg cannot read the file"):
            outline_video(source, tmp_path, LIMITS)
    assert outline_video("a.ts", tmp_path, LIMITS).total_frames == 1
    if name != "a.sdp":
        with av.open(str(tmp_path / name)) as container:
            assert len(list(container.decode(video=0))) == 1, "the attack is none"


@pytest.mark.parametrize("name", ["a.m3u8", "a.mp4"])
def test_a_playlist_of_addresses_fetches_nothing(name: str, tmp_path: Path, requests: tuple[str, list[str]]) -> None:
    address, asked = requests
    (tmp_path / name).write_text(playlists(f"{address}/a.ts")["a.m3u8"])
    with pytest.raises(ValueError, match="FFmpeg cannot read the file"):
        outline_video(name, tmp_path, LIMITS)
    assert asked == []
    with pytest.raises(av.error.FFmpegError), (tmp_path / name).open("rb") as file:
        av.open(file)
    assert (asked != []) == (name == "a.m3u8"), "FFmpeg would fetch what a playlist with the right name says"


@pytest.mark.parametrize("name", ["concat:a.avi", "subfile,,start,0,end,0,,:a.avi", "file:a.avi", "pipe:0"])
def test_a_name_with_one_of_ffmpegs_protocols_is_the_name_of_a_file(name: str, folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    for place in (folder, None):
        with pytest.raises(FileNotFoundError):
            outline_video(name, place, LIMITS)


# ---- bombs ----


def png_of(width: int, height: int) -> bytes:
    """All of a PNG file but most of its pixels, which nothing reads before it knows how many there are."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(width + 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_with_too_many_pixels_is_refused_before_they_are_decoded(tmp_path: Path) -> None:
    width, height = 10_000, MAX_IMAGE_PIXELS // 10_000
    assert open_image(png_of(width, height)).size == (width, height)
    for read in (open_image, outline_of_frames):
        with pytest.raises(ValueError, match=f"{width} x {height + 1} pixels .* more than {MAX_IMAGE_PIXELS} are not"):
            read(png_of(width, height + 1), tmp_path)
    with pytest.raises(Image.DecompressionBombError):
        open_image(png_of(60_000, 60_000))


def test_a_video_with_too_many_pixels_is_refused_before_they_are_decoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_frame(_: Any) -> None:
        raise AssertionError("a frame is decoded")

    width, height = SIZE
    with monkeypatch.context() as patch:
        patch.setattr("verl.data.video._upright_size", no_frame)
        patch.setattr("verl.data.video.MAX_VIDEO_PIXELS", 2 * width * height - 1)
        with pytest.raises(ValueError, match=f"2 frames of {width} x {height} pixels, more than"):
            outline_video("a.avi", folder, LIMITS)
        patch.setattr("verl.data.video.MAX_IMAGE_PIXELS", width * height - 1)
        with pytest.raises(ValueError, match=f"frames have {width} x {height} pixels and may be a decompression bomb"):
            outline_video("a.avi", folder, LIMITS)
    assert outline_video("a.avi", folder, LIMITS).total_frames == 2


def test_frames_that_are_larger_than_the_header_says_are_not_decoded(tmp_path: Path) -> None:
    """The header of an AVI file says 16 x 16, the JPEG pictures in it are above the limit, and small on the disk."""
    side, claimed = 10_000, (16, 16)
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=2)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuvj420p"
        container.mux(stream.encode(av.VideoFrame(side, side, "yuvj420p")))
        container.mux(stream.encode())
    content = (tmp_path / "a.avi").read_bytes()
    lying = content.replace(struct.pack("<II", side, side), struct.pack("<II", *claimed))
    assert len(lying) == len(content) and lying != content
    with pytest.raises(ValueError, match="FFmpeg cannot read|no frame of the file can be decoded"):
        outline_video(lying, None, LIMITS)


def test_more_frames_than_a_file_could_show_are_refused_before_they_are_opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verl.data.video.MAX_FRAMES", 4)
    monkeypatch.setattr("verl.data.video.MAX_FRAME_PIXELS", SIZE[0] * SIZE[1])
    assert len(load_video(["a.png"] * 4, folder, LIMITS).frames) == 4
    with pytest.raises(ValueError, match=f"5 frames are shown of {SIZE[0]} x {SIZE[1]} pixels each, together more"):
        load_video(["a.png", *["absent.png"] * 4], folder, LIMITS)


def test_a_picture_that_is_a_program_is_not_run(tmp_path: Path) -> None:
    program = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(touched) (w) file closefile\nshowpage\n"
    )
    (tmp_path / "a.png").write_bytes(program)
    assert Image.open(tmp_path / "a.png").format == "EPS"
    with pytest.raises(ValueError, match="EPS files are programs"):
        open_image("a.png", tmp_path)


# ---- in a dataset ----


@pytest.mark.parametrize(("kind", "name"), [("image", "../a.png"), ("video", "../a.avi")])
def test_a_row_that_leaves_its_folder_is_named_with_the_key(kind: str, name: str, folder: Path) -> None:
    from tests.test_video import make_dataset

    rows = [{"prompt": "a", f"{kind}s": []}, {"prompt": f"<{kind}>", f"{kind}s": [name]}]
    with pytest.raises(ValueError, match=rf"row 1 of .*: {kind} 0 cannot be read: it is outside of data.image_dir: "):
        make_dataset("Qwen2.5-VL", folder, rows)
