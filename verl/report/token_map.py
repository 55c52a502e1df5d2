# SPDX-License-Identifier: Apache-2.0
"""A page of responses: tokens coloured by weight, beside the images with each token's attention.

The page is one self-contained file. The template escapes all texts of models and data, and the page's content policy
allows only its own script.

Shapes: T tokens of a response.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup

from verl.report.numbers import number_text

if TYPE_CHECKING:
    from verl.data.image_grids import PictureMap

TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("verl.report"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
)
"""The templates of all pages. `token_map.html` has the macros of a sample."""

COLOURS = 11
"""Classes c0 (weighs least) to c10 (weighs most) of the style sheet; the one in the middle weighs 1."""

MOST_TOKENS = 30_000
"""Largest number of tokens on a page; beyond it, the longest responses are cut in the middle."""

MAP_BYTES = 1_600_000
"""Largest size of all maps of a page, one byte per field. To fit, maps become coarser and tokens share maps."""

FEWEST_FIELDS = 36
"""Fewest fields to which a map is reduced; beyond that, neighbouring tokens share a map."""

VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
"""Invisible control characters and the Unicode symbols shown for them."""

LONGEST_TEXT = 6_000
"""Largest number of characters shown of a prompt or an answer."""


@dataclass(frozen=True)
class TokenMap:
    """A response and everything that the page shows about it."""

    tokens: Sequence[str]
    """T texts from `token_texts`; a token with an empty text shares the character before it."""
    weights: Sequence[float]
    """T weights, as used in the loss."""
    vgr: Sequence[float]
    """T values of VGR, NaN where undefined."""
    prompt: str
    images: Sequence[str] = ()
    """`data:` URIs of the prompt's images; see `picture_uris`."""
    maps: Sequence[PictureMap] = ()
    """One map per image, (T, rows, columns): each token's attention on the fields of the image."""
    answer: str | None = None
    """The ground truth."""
    reward: float | None = None
    advantage: float | None = None
    title: str = ""
    """A note, for example where the sample comes from."""

    def __post_init__(self) -> None:
        lengths = {len(self.tokens), len(self.weights), len(self.vgr), *(len(one.values) for one in self.maps)}
        assert len(lengths) == 1, f"tokens, weights, vgr and maps have {sorted(lengths)} entries"
        assert len(self.maps) in (0, len(self.images)), f"{len(self.maps)} maps for {len(self.images)} pictures"
        assert all(uri.startswith("data:image/") for uri in self.images), "a picture is no part of the page"


@dataclass(frozen=True)
class Table:
    """Numbers above the samples."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def token_map_html(
    samples: Sequence[TokenMap],
    title: str = "Token weights",
    notes: Sequence[str] = (),
    tables: Sequence[Table] = (),
    bounds: tuple[float, float] = (0.2, 3.0),
) -> str:
    """The page, below 5 MB for 32 samples with pictures of `picture_uris`.

    Args:
        notes: sentences below the title.
        bounds: lowest and highest weight of the colour scale, below and above 1; weights outside take the end colours.
    """
    return render(
        "token_map_page.html",
        title=title,
        notes=notes,
        tables=tables,
        samples=[*page_samples(samples, bounds)],
        scale=colour_scale(bounds),
    )


def render(template: str, **values: Any) -> str:
    """Renders a template that extends `page.html`, with a content policy that allows only its own style and script."""
    style, script = (TEMPLATES.loader.get_source(TEMPLATES, f"token_map.{kind}")[0] for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash_of(style)}'; script-src '{_hash_of(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    template = TEMPLATES.get_template(template)
    return template.render(style=Markup(style), script=Markup(script), policy=policy, **values)


def page_samples(samples: Sequence[TokenMap], bounds: tuple[float, float]) -> list[dict[str, Any]]:
    """Arguments of the macro `sample` for all samples of a page, which share the page's space."""
    most_tokens = _share_of_longest([len(sample.tokens) for sample in samples], MOST_TOKENS)
    num_maps = sum(min(len(sample.tokens), most_tokens) * len(sample.maps) for sample in samples)
    fields = MAP_BYTES // max(1, num_maps)
    return [_page_sample(sample, bounds, most_tokens, fields) for sample in samples]


def colour_scale(bounds: tuple[float, float]) -> list[tuple[str, str]]:
    """The CSS class of each colour, lowest weight first, and the weight at its middle."""
    low, high = _ends(bounds)
    middle = COLOURS // 2
    steps = [(place - middle) / middle for place in range(COLOURS)]
    weights = [low**-step if step < 0 else high**step for step in steps]
    return [(f"c{place}", f"{weight:.2g}") for place, weight in enumerate(weights)]


def colour_of(weight: float, bounds: tuple[float, float]) -> int:
    """The index of a weight's colour: even steps of the logarithm from the lower bound to 1, and from 1 to the upper
    bound."""
    low, high = _ends(bounds)
    middle = COLOURS // 2
    if weight <= low:
        return 0
    share = math.log(weight) / math.log(high) if weight > 1 else -math.log(weight) / math.log(low)
    return middle + round(middle * min(share, 1.0))


def _ends(bounds: tuple[float, float]) -> tuple[float, float]:
    """Bounds with room on both sides of 1, for a logarithmic scale."""
    return min(max(bounds[0], 0.05), 0.9), max(bounds[1], 1.1)


def _page_sample(sample: TokenMap, bounds: tuple[float, float], most_tokens: int, fields: int) -> dict[str, Any]:
    kept = _kept_places(len(sample.tokens), most_tokens)  # (t,)
    looks = None
    if sample.maps:
        image_attention = sum(one.values.sum(axis=(1, 2), dtype=np.float64) for one in sample.maps)
        looks = [_short(image_attention[place]) for place in kept]
    gap = next((place for place in range(1, len(kept)) if kept[place] != kept[place - 1] + 1), None)
    data = {
        "weights": [_short(sample.weights[place]) for place in kept],
        "vgr": [_short(sample.vgr[place]) for place in kept],
        "looks": looks,
        "gap": None if gap is None else [gap, len(sample.tokens) - len(kept)],
        "pictures": [_packed_map(one, kept, fields) for one in sample.maps],
    }
    return {
        "title": sample.title,
        "prompt": _cut(sample.prompt),
        "answer": None if sample.answer is None else _cut(sample.answer),
        "reward": None if sample.reward is None else number_text(sample.reward),
        "advantage": None if sample.advantage is None else number_text(sample.advantage),
        "num_tokens": len(sample.tokens),
        "pieces": _pieces(sample, kept, gap, bounds),
        "images": sample.images,
        "data": data,
    }


def _pieces(
    sample: TokenMap, kept: Sequence[int], gap: int | None, bounds: tuple[float, float]
) -> list[tuple[str, int, int, bool]]:
    """Pieces: visible text, number of tokens, colour and whether the line breaks; a piece without tokens is the gap.

    Tokens that share a character form one piece, coloured by their mean weight.
    """
    texts = [sample.tokens[place] for place in kept]
    runs = token_groups(texts[:gap])
    if gap is not None:
        runs += [[], *([gap + number for number in run] for run in token_groups(texts[gap:]))]
    pieces = []
    for run in ([kept[number] for number in run] for run in runs):
        text = visible("".join(sample.tokens[place] for place in run))
        weight = sum(sample.weights[place] for place in run) / len(run) if run else 1.0
        pieces.append((text, len(run), colour_of(weight, bounds), "\n" in text))
    return pieces


def token_groups(tokens: Sequence[str]) -> list[list[int]]:
    """Groups of token positions; tokens that share a character are in one group."""
    groups: list[list[int]] = []
    for place, token in enumerate(tokens):
        if groups and token == "":
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def visible(text: str) -> str:
    """The text with the symbols of `VISIBLE` in place of control characters."""
    return text.translate(VISIBLE)


def _kept_places(num_tokens: int, most: int) -> list[int]:
    """Positions of the shown tokens: three quarters from the beginning, the rest from the end."""
    if num_tokens <= most:
        return list(range(num_tokens))
    first = most * 3 // 4
    return [*range(first), *range(num_tokens - (most - first), num_tokens)]


def _share_of_longest(lengths: Sequence[int], total: int) -> int:
    """The largest limit for which the lengths, cut to it, have a sum of at most `total`."""
    left = total
    for place, length in enumerate(sorted(lengths)):
        share = left // (len(lengths) - place)
        if length > share:
            return share
        left -= length
    return max(lengths, default=0)


def _packed_map(picture: PictureMap, kept: Sequence[int], fields: int) -> dict[str, Any]:
    """One byte per field, relative to the map's maximum; the last map is the mean over all tokens."""
    values = np.asarray(picture.values, dtype=np.float32)  # (T, rows, columns)
    pooled = _pooled(values[list(kept)], max(fields, FEWEST_FIELDS))
    stride = math.ceil(pooled[0].size / max(1, fields)) if len(pooled) else 1
    starts = np.arange(0, len(pooled), stride)
    shared = np.add.reduceat(pooled, starts, axis=0) if len(pooled) else pooled
    whole = _pooled(values.sum(axis=0, keepdims=True), max(fields, FEWEST_FIELDS))  # an empty response looks nowhere
    maps = np.concatenate([shared, whole])  # (maps, rows, columns)
    peaks = maps.max(axis=(1, 2), keepdims=True, initial=0.0)
    levels = np.divide(maps, peaks, out=np.zeros_like(maps), where=peaks > 0)
    data = np.round(255 * levels).astype(np.uint8).tobytes()
    return {
        "rows": maps.shape[1],
        "columns": maps.shape[2],
        "box": [round(edge, 4) for edge in picture.box],
        "stride": stride,
        "data": base64.b64encode(data).decode("ascii"),
    }


def _pooled(values: np.ndarray, most: int) -> np.ndarray:
    """(T, fewer rows, fewer columns), means over blocks, with at most `most` fields."""
    _, rows, columns = values.shape
    side = 1
    while math.ceil(rows / side) * math.ceil(columns / side) > most:
        side += 1
    if side == 1:
        return values
    sums = np.add.reduceat(
        np.add.reduceat(values, np.arange(0, rows, side), axis=1), np.arange(0, columns, side), axis=2
    )
    heights, widths = (np.diff([*range(0, length, side), length]) for length in (rows, columns))
    return sums / (heights[:, None] * widths)


def _short(number: float) -> float | None:
    return float(f"{number:.3g}") if math.isfinite(number) else None


def _cut(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]} … ({len(text) - LONGEST_TEXT:,} more characters)"


def _hash_of(source: str) -> str:
    digest = hashlib.sha256(source.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
