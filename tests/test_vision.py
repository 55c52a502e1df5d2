# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_vision.py
"""One image, whatever its form, is one set of pixels: in the dataset, on the wire and as model features."""

import base64
import io
import pickle
import struct
import warnings
import zlib
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import ray
import torch
from PIL import ExifTags, Image
from transformers import Qwen2_5_VLProcessor

from tests.tiny import CORPUS, build_processor, build_tokenizer
from verl.data.features import Featurizer
from verl.data.image_noise import ImageNoise
from verl.data.vision import UNREADABLE_IMAGE, MediaHandle, open_image, process_image, target_size


def make_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise, so that any change of pixels shows."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", **options)
    return buffer.getvalue()


def png_of_chunks(size: tuple[int, int], depth: int, colour: int, rows: bytes, chunk: tuple[bytes, bytes]) -> bytes:
    """A PNG file with one more chunk before its pixels.

    Args:
        colour: the colour type of the PNG standard: 0 for grey, 2 for RGB.
        rows: the pixels, each row with its filter byte in front.
    """
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)),
        chunk,
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    framed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def same_pixels(left: Image.Image, right: Image.Image) -> bool:
    return np.array_equal(np.asarray(left), np.asarray(right))


def whole_processor() -> Qwen2_5_VLProcessor:
    return build_processor(build_tokenizer(CORPUS))


def test_every_form_of_an_image_opens_to_the_same_pixels(tmp_path: Path) -> None:
    image = make_image(30, 20)
    (tmp_path / "a.png").write_bytes(png(image))
    forms = [
        image,
        png(image),
        {"bytes": png(image), "path": None},
        {"bytes": None, "path": "a.png"},
        "a.png",
        Path("a.png"),
        str(tmp_path / "a.png"),
    ]
    for form in forms:
        assert same_pixels(open_image(form, tmp_path), image)


def test_a_photo_taken_on_its_side_is_turned_upright_in_every_form(tmp_path: Path) -> None:
    """Orientation 6 of the Exif standard: the image is to be shown rotated by 90 degrees clockwise."""
    image = make_image(30, 20)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = png(image, exif=exif)
    for form in (turned, Image.open(io.BytesIO(turned))):
        assert same_pixels(open_image(form), image.transpose(Image.Transpose.ROTATE_270))


def orientation_chunk(kind: str, orientation: int) -> tuple[bytes, bytes]:
    """The chunk of a PNG file that older programs and Adobe's write for the orientation."""
    if kind == "XMP":
        packet = f'<rdf:Description tiff:Orientation="{orientation}"/>'
        return b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet.encode()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    profile = f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n"
    return b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile.encode())


@pytest.mark.parametrize("kind", ["raw profile", "XMP"])
def test_the_orientation_of_a_png_is_read_from_text_as_well(kind: str) -> None:
    """Orientation 6 is a rotation by 90 degrees clockwise: the left of two pixels comes to the top."""
    turned = open_image(png_of_chunks((2, 1), 8, 0, b"\0\x05\x09", orientation_chunk(kind, 6)))
    assert np.asarray(turned).tolist() == [[5], [9]]


@pytest.mark.parametrize("kind", ["raw profile", "XMP"])
def test_opening_a_png_whose_text_says_it_is_upright_decodes_no_pixels(kind: str) -> None:
    whole = png_of_chunks((100, 100), 8, 0, (b"\0" + bytes(range(100))) * 100, orientation_chunk(kind, 1))
    half = open_image(whole[:-60])
    assert half.size == (100, 100)
    with pytest.raises(OSError, match="truncated"):
        process_image(half, None, None)


def damaged(file_format: str) -> bytes:
    """A file whose header lacks what tells a decoder where the pixels are, or of what kind."""
    buffer = io.BytesIO()
    make_image(20, 24).save(buffer, format=file_format)
    content = buffer.getvalue()
    if file_format == "AVIF":
        return content.replace(b"pitm", b"free")  # the box that names the main item becomes one to pass over
    return content[:80] + bytes(4) + content[84:]  # the flags of the pixel format


@pytest.mark.parametrize("file_format", ["AVIF", "DDS"])
def test_a_damaged_image_of_any_format_counts_as_unreadable(file_format: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        process_image(open_image(damaged(file_format)), None, None)
    assert isinstance(caught.value, UNREADABLE_IMAGE)


def test_exif_data_that_is_cut_off_counts_as_unreadable() -> None:
    with warnings.catch_warnings(action="ignore"), pytest.raises(UNREADABLE_IMAGE, match="requires a buffer"):
        open_image(png_of_chunks((1, 1), 8, 0, b"\0\0", (b"eXIf", b"MM\0*\0\0")))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_opening_decodes_no_pixels(file_format: str) -> None:
    """Half a file has its size and no more; counting tokens over a whole set must not cost a decoding of it."""
    buffer = io.BytesIO()
    make_image(100, 100).save(buffer, format=file_format)
    half = open_image(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    assert half.size == (100, 100)
    with pytest.raises(OSError, match="truncated"):
        process_image(half, None, None)


def test_uris_and_dicts_open_as_their_files_do(tmp_path: Path) -> None:
    make_image(6, 4).save(tmp_path / "a b[1].png")
    path, content = str(tmp_path / "a b[1].png"), (tmp_path / "a b[1].png").read_bytes()
    expected = process_image(open_image(path), None, None)
    uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    for source in (uri, Path(path).as_uri(), {"image": path}, {"image": content}, {"path": Path(path).as_uri()}):
        assert process_image(open_image(source), None, None) == expected


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("https://example.org/a.png", "media are read from files, not fetched: download 'https://example.org/a.png"),
        ("S3://bucket/a.png", "media are read from files, not fetched"),
        ("data:image/png,abc", "a data URI has to be base64"),
        ("data:image/png;base64,a", "the base64 of .* is damaged"),
    ],
)
def test_uris_that_cannot_be_read_are_refused_in_one_short_line(uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        open_image(uri + "x" * 1000)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize("source", [None, 3, {"bytes": None, "path": None}])
def test_something_that_is_no_image_is_shown_in_the_error(source: object) -> None:
    with pytest.raises(ValueError, match=r"PIL image, bytes, a path.*not (None|3)"):
        open_image(source)


@pytest.mark.parametrize("size", [(1000, 500), (500, 1000), (10, 5), (100, 100), (4000, 1)])
def test_an_image_is_brought_within_its_bounds_and_keeps_its_shape(size: tuple[int, int]) -> None:
    """Rounding down may lose one pixel on each side, so an area may miss the lower bound by width + height."""
    width, height = target_size(*size, min_pixels=2_500, max_pixels=40_000)
    assert width * height <= 40_000
    assert width * height >= 2_500 - width - height
    assert abs(width * size[1] - height * size[0]) <= max(size)


def test_bounds_by_hand_and_no_bounds() -> None:
    """1000 x 500 to an area of 5000: both sides by sqrt(5000 / 500000) = 1/10."""
    assert target_size(1000, 500, None, 5_000) == (100, 50)
    assert target_size(10, 5, 5_000, None) == (100, 50)
    assert target_size(1000, 500, None, None) == (1000, 500)
    assert target_size(1000, 500, 5_000, 500_000) == (1000, 500)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb_of_the_size_foretold(mode: str) -> None:
    image = process_image(make_image(60, 40).convert(mode), 28 * 28, 600)
    assert image.mode == "RGB"
    assert image.size == target_size(60, 40, 28 * 28, 600)


def reopened(image: Image.Image, file_format: str, **options) -> Image.Image:
    """The image as it comes out of a file."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def pixel(image: Image.Image, x: int) -> tuple[int, int, int]:
    return process_image(image, None, None).getpixel((x, 0))


def test_ink_on_a_transparent_background_stays_ink_on_white() -> None:
    """Black with full, half and no opacity; a palette or a colour can be transparent as well."""
    rgba = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((255, 128, 0)):
        rgba.putpixel((x, 0), (0, 0, 0, alpha))
    for image in (
        rgba,
        reopened(rgba, "PNG"),
        reopened(rgba.convert("LA"), "PNG"),
        reopened(rgba, "WEBP", lossless=True),
    ):
        assert [pixel(image, x)[0] for x in (0, 2)] == [0, 255]
        assert pixel(image, 1)[0] == pytest.approx(127, abs=1)

    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    assert [pixel(reopened(palette, "PNG", transparency=0), x) for x in (0, 1)] == [(255, 255, 255), (10, 20, 30)]
    palette.putalpha(Image.new("L", (2, 1), 0))
    assert palette.mode == "PA"
    assert pixel(palette, 1) == (255, 255, 255)
    grey = Image.new("L", (2, 1), 7)
    grey.putpixel((1, 0), 200)
    assert [pixel(reopened(grey, "PNG", transparency=7), x)[0] for x in (0, 1)] == [255, 200]
    coloured = Image.new("RGB", (2, 1), (1, 2, 3))
    coloured.putpixel((1, 0), (4, 5, 6))
    transparent = reopened(coloured, "PNG", transparency=(1, 2, 3))
    assert [pixel(transparent, x) for x in (0, 1)] == [(255, 255, 255), (4, 5, 6)]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_by_their_range(file_format: str) -> None:
    """0, a quarter, a half and all of 65535."""
    image = reopened(Image.fromarray(np.array([[0, 16384, 32768, 65535]], dtype=np.uint16)), file_format)
    assert [pixel(image, x) for x in range(4)] == [(grey,) * 3 for grey in (0, 64, 128, 255)]


@pytest.mark.parametrize(
    ("depth", "colour", "rows", "transparent", "expected"),
    [
        (16, 0, struct.pack(">x3H", 0, 1040, 2080), (1000,), [0, 4, 8]),
        (16, 0, struct.pack(">x3H", 0, 1040, 2080), (1040,), [0, 255, 8]),
        (16, 0, struct.pack(">x3H", 0, 1040, 1041), (1040,), [0, 255, 4]),
        (16, 2, struct.pack(">x6H", *[232 * 256] * 3, *[1000] * 3), (1000,) * 3, [232, 255]),
        (4, 0, b"\0\x03\x80", (3,), [0, 255, 136]),
        (2, 0, b"\0\x18", (1,), [0, 255, 170]),
    ],
)
def test_a_transparent_colour_is_that_of_the_file_at_any_depth(
    depth: int, colour: int, rows: bytes, transparent: tuple[int, ...], expected: list[int]
) -> None:
    """A step is 255 / 65535 of 16 bits, 17 of four bits and 85 of two; Pillow keeps the high byte of 16-bit RGB."""
    chunk = (b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    image = open_image(png_of_chunks((len(expected), 1), depth, colour, rows, chunk))
    assert [pixel(image, x) for x in range(len(expected))] == [(level,) * 3 for level in expected]


@pytest.mark.parametrize(("mode", "kind"), [("F", "floats"), ("I", "32-bit integers")])
def test_numbers_without_a_range_are_refused_by_name(mode: str, kind: str) -> None:
    image = reopened(Image.new(mode, (2, 1), 1), "TIFF")
    with pytest.raises(ValueError, match=rf"image mode {mode} \({kind}\) does not say what black and white are"):
        process_image(image, None, None)


def test_a_handle_is_equal_to_its_copies_and_to_no_other_handle_of_the_same_image() -> None:
    image = make_image(30, 20)
    handle, other = MediaHandle.put(image), MediaHandle.put(image)
    copy = pickle.loads(pickle.dumps(handle))
    assert handle == copy
    assert hash(handle) == hash(copy)
    assert handle != other
    assert same_pixels(copy.load(), image)


def test_under_ray_a_handle_travels_small_and_loads_elsewhere(ray_cluster: None) -> None:
    image = make_image(400, 300)
    handle = MediaHandle.put(image)

    @ray.remote
    def load_there(rows: list[list[MediaHandle]]) -> tuple[bool, np.ndarray]:
        return rows[0][0] == rows[1][0], np.asarray(rows[0][0].load())

    are_equal, pixels = ray.get(load_there.remote([[handle], [handle]]))
    assert are_equal
    assert np.array_equal(pixels, np.asarray(image))
    assert same_pixels(handle.load(), image)
    assert len(cloudpickle.dumps(handle)) < 2_000 < len(image.tobytes())


def test_features_are_those_of_each_image_alone_in_row_order() -> None:
    """Shared, repeated, absent and several images a row; the slow path processes each occurrence by itself."""
    processor = whole_processor()
    first, second, third = (
        MediaHandle.put(make_image(*size, seed)) for seed, size in enumerate([(60, 40), (90, 90), (60, 40)])
    )
    media = [[second, first], None, [first], [], [third, first, second]]
    features = Featurizer(processor).featurize(media)

    alone = [
        processor.image_processor(images=[handle.load()], return_tensors="pt")
        for row in media
        if row
        for handle in row
    ]
    assert features.keys() == alone[0].keys()
    for key in ("pixel_values", "image_grid_thw"):
        assert torch.equal(features[key], torch.cat([single[key] for single in alone]))


def test_each_distinct_image_is_processed_once(processed_images: list[Image.Image]) -> None:
    first, second = MediaHandle.put(make_image(60, 40)), MediaHandle.put(make_image(40, 60))
    copies = [pickle.loads(pickle.dumps(first)) for _ in range(3)]
    features = Featurizer(whole_processor()).featurize([[copy] for copy in copies] + [[second]])
    assert len(processed_images) == 2
    assert len(features["image_grid_thw"]) == 4


def test_features_are_kept_for_later_passes_up_to_a_number_of_bytes(processed_images: list[Image.Image]) -> None:
    """Two of three images of equal size fit; the third is processed in each pass, the order being the same."""
    handles = [MediaHandle.put(make_image(60, 40, seed)) for seed in range(3)]
    media = [[handle] for handle in handles]
    first = Featurizer(whole_processor()).featurize(media)
    num_bytes = sum(value.nbytes for value in first.values())
    processed_images.clear()
    featurizer = Featurizer(whole_processor(), num_bytes * 2 // 3)
    for count in (3, 4, 5):
        features = featurizer.featurize(media)
        assert all(torch.equal(features[name], first[name]) for name in first)
        assert len(processed_images) == count
    featurizer.clear()
    featurizer.featurize(media)
    assert len(processed_images) == 8


def test_spoilt_images_are_not_taken_for_the_images_themselves(processed_images: list[Image.Image]) -> None:
    featurizer = Featurizer(whole_processor(), 2**20)
    media = [[MediaHandle.put(make_image(60, 40))]]
    blank = featurizer.featurize(media, ImageNoise("blank", 0.0))["pixel_values"]
    whole = featurizer.featurize(media)["pixel_values"]
    assert not torch.equal(blank, whole)
    assert torch.equal(featurizer.featurize(media, ImageNoise("blank", 0.0))["pixel_values"], blank)
    assert torch.equal(featurizer.featurize(media)["pixel_values"], whole)
    assert len(processed_images) == 3


def test_rows_without_images_have_no_features() -> None:
    assert Featurizer(whole_processor()).featurize([None, []]) == {}
