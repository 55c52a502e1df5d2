# SPDX-License-Identifier: Apache-2.0
"""A token map as a picture, for loggers without HTML: coloured tokens, and the response's mean attention.

Letters come from this machine's fonts. A letter that no font has is drawn as a box.
"""

from __future__ import annotations

import base64
import io
import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from verl.report.numbers import number_text
from verl.report.token_map import TokenMap, colour_of, token_groups, visible

if TYPE_CHECKING:
    from verl.data.image_grids import PictureMap

COLOURS = (
    "#998ec3", "#aea5d0", "#c3bcdc", "#d7d3e8", "#ebe9f3", "#ffffff", "#fdebd3", "#fcd7a8", "#f9c27c", "#f4ac50",
    "#ec9526",
)  # fmt: skip
"""The colours of the page's style sheet on light ground."""

COLUMNS, MOST_LINES = 96, 60
"""Width of the text; a wide letter, such as a Chinese one, takes two columns."""

LETTER, LINE, MARGIN = 14, 22, 10
"""Height of letters, height of lines and margin, in pixels."""

PICTURE, MOST_PICTURES = 224, 3
"""Longest side of an image in pixels, and the number of images shown."""

WIDE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
              "Droid Sans Fallback", "SimHei", "PingFang SC")  # fmt: skip
"""Fonts tried in this order for letters that DejaVu Sans Mono lacks."""

TINT = (255, 128, 0)
"""Colour of the attention, over a grey image."""


class Letter(NamedTuple):
    """A letter or space at its position."""

    text: str
    line: int
    column: int
    colour: int | None
    """Background colour; None for none."""


class Font(NamedTuple):
    """A font, and the code points that it has."""

    face: ImageFont.FreeTypeFont
    letters: frozenset[int]


def token_map_image(sample: TokenMap, bounds: tuple[float, float]) -> np.ndarray:
    """The picture, (height, width, 3) uint8.

    Args:
        bounds: lowest and highest weight of the colour scale.
    """
    letters = list(_laid_out(sample, bounds))
    pictures = _overlaid(sample)
    fonts = _fonts()
    column_width = round(fonts[0].face.getlength("m"))
    num_lines = 1 + max((letter.line for letter in letters), default=0)
    size = (
        2 * MARGIN + column_width * COLUMNS,
        2 * MARGIN + LINE * num_lines + (PICTURE + MARGIN if pictures else 0),
    )
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for letter in letters:
        left, top = MARGIN + column_width * letter.column, MARGIN + LINE * letter.line
        if letter.colour is not None:
            right, bottom = left + column_width * _columns(letter.text) - 1, top + LINE - 3
            draw.rectangle((left, top, right, bottom), fill=COLOURS[letter.colour])
        font = next((font for font in fonts if ord(letter.text) in font.letters), fonts[0])
        draw.text((left, top + 1), letter.text, fill="black", font=font.face)
    left = MARGIN
    for picture in pictures:
        canvas.paste(picture, (left, size[1] - PICTURE - MARGIN))
        left += picture.width + MARGIN
    return np.asarray(canvas)


def _laid_out(sample: TokenMap, bounds: tuple[float, float]) -> Iterator[Letter]:
    """The letters of the title, the facts and the prompt, then the tokens, in lines of `COLUMNS`."""
    facts = [("reward", sample.reward), ("advantage", sample.advantage)]
    details = [f"{name} {number_text(value)}" for name, value in facts if value is not None]
    if sample.answer is not None:
        details.append(f"answer {sample.answer}")
    head = "\n".join(text for text in (sample.title, ", ".join(details), sample.prompt) if text)
    runs = [(f"{head}\n", None)]
    for places in token_groups(sample.tokens):
        text = "".join(sample.tokens[place] for place in places)
        runs.append((text, colour_of(float(np.mean([sample.weights[place] for place in places])), bounds)))
    line = column = 0
    for text, colour in runs:
        for letter in visible(text):
            if letter == "\n":
                line, column = line + 1, 0
                continue
            letter = " " if letter == "\t" else letter
            if column + _columns(letter) > COLUMNS:
                line, column = line + 1, 0
            if line >= MOST_LINES:
                return
            yield Letter(letter, line, column, colour)
            column += _columns(letter)


def _columns(letter: str) -> int:
    """The number of columns of a letter; a combining accent takes none."""
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def _overlaid(sample: TokenMap) -> list[Image.Image]:
    """The first images, with the response's mean attention map if there is one."""
    pictures = []
    for place, uri in enumerate(sample.images[:MOST_PICTURES]):
        picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
        scale = PICTURE / max(picture.size)
        picture = picture.resize([max(1, round(scale * side)) for side in picture.size])
        if sample.maps and len(sample.tokens):
            picture = _tinted(picture, sample.maps[place])
        pictures.append(picture)
    return pictures


def _tinted(picture: Image.Image, attention: PictureMap) -> Image.Image:
    field = np.asarray(attention.values, dtype=np.float32).mean(axis=0)  # (rows, columns)
    levels = 0.8 * np.sqrt(field / max(float(field.max()), 1e-12))
    left, top, right, bottom = (
        round(share * side) for share, side in zip(attention.box, (*picture.size, *picture.size), strict=True)
    )
    seen = Image.fromarray((255 * levels).astype(np.uint8)).resize(
        (max(1, right - left), max(1, bottom - top)), Image.Resampling.NEAREST
    )
    mask = Image.new("L", picture.size, 0)
    mask.paste(seen, (left, top))
    return Image.composite(Image.new("RGB", picture.size, TINT), picture.convert("L").convert("RGB"), mask)


@cache
def _fonts() -> list[Font]:
    from matplotlib import font_manager  # takes half a second, so only runs with a report import it
    from matplotlib.ft2font import FT2Font

    manager = font_manager.fontManager
    paths = {font.name: font.fname for font in manager.ttflist}
    chosen = [paths["DejaVu Sans Mono"], *(paths[name] for name in WIDE_FONTS if name in paths)]
    return [Font(ImageFont.truetype(path, LETTER), frozenset(FT2Font(path).get_charmap())) for path in chosen]
