# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_token_map.py
"""The page of token maps shows texts as they are, holds the numbers it was given, and nothing in it can act."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.batches import random_image
from verl.data.image_grids import PictureMap
from verl.report import token_map
from verl.report.pictures import picture_uris
from verl.report.token_map import COLOURS, TEMPLATES, Table, TokenMap, colour_of, colour_scale, token_map_html

WHOLE = (0.0, 0.0, 1.0, 1.0)
HOSTILE = ("</script>", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\"' onclick=alert(1) {{ 7*7 }}")
BOUNDS = (0.2, 3.0)


class Page(HTMLParser):
    """What a browser would make of a page: its elements, and the text of its responses."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.responses: list[str] = []
        self.prompts: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.elements.append((tag, given))
        if tag in ("meta", "img"):
            return
        kind = given.get("class") if given.get("class") in ("response", "prompt") else tag
        self._open.append(kind)
        into = {"response": self.responses, "prompt": self.prompts, "script": self.scripts, "style": self.styles}
        if kind in into:
            into[kind].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for kind, texts in (("response", self.responses), ("prompt", self.prompts)):
            if kind in self._open:
                texts[-1] += data
        for kind, texts in (("script", self.scripts), ("style", self.styles)):
            if self._open and self._open[-1] == kind:
                texts[-1] += data

    @property
    def data(self) -> list[dict]:
        return [json.loads(script) for script in self.scripts[:-1]]


def sample_of(tokens: list[str], num_images: int = 0, side: int = 4, seed: int = 0) -> TokenMap:
    generator = np.random.default_rng(seed)
    maps = [
        PictureMap(generator.random((len(tokens), side, side), dtype=np.float32), WHOLE) for _ in range(num_images)
    ]
    return TokenMap(
        tokens=tokens,
        weights=generator.uniform(0.2, 3.0, len(tokens)).tolist(),
        vgr=generator.uniform(0.1, 9.0, len(tokens)).tolist(),
        prompt="What is it?",
        images=picture_uris([random_image((64, 48), index) for index in range(num_images)]),
        maps=maps,
    )


def test_texts_of_models_and_data_are_texts_and_nothing_else() -> None:
    hostile = "".join(HOSTILE)
    sample = replace(sample_of(list(HOSTILE), 1), prompt=hostile, answer=hostile, title=hostile)
    table = Table(hostile, [hostile], [[hostile]])
    html = token_map_html([sample], title=hostile, notes=[hostile], tables=[table])
    page = Page(html)
    assert page.responses == [hostile] and page.prompts == [hostile]
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert [given["src"][:11] for tag, given in page.elements if tag == "img"] == ["data:image/"]
    acting = [name for _, given in page.elements for name in given if name.startswith("on") or name == "style"]
    assert acting == [] and "49" not in page.responses[0]
    assert not {"a", "iframe", "object", "link", "base", "form"} & {tag for tag, _ in page.elements}


def test_the_page_allows_its_own_script_and_style_and_asks_for_nothing() -> None:
    html = token_map_html([sample_of(["a"], 1)])
    page = Page(html)
    (policy,) = [given["content"] for _, given in page.elements if given.get("http-equiv")]
    hashes = [
        f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
        for text in (page.scripts[-1], *page.styles)
    ]
    assert all(one in policy for one in hashes) and "default-src 'none'" in policy and "unsafe" not in policy
    assert "http://" not in html and "https://" not in html and "url(" not in page.styles[0]
    assert not any(name in page.scripts[-1] for name in ("innerHTML", "fetch", "XMLHttpRequest", "eval", "import"))


def test_spaces_lines_and_every_script_are_kept() -> None:
    tokens = ["  two", " spaces\n\n", "\ttab", "你", "好", "", "", "שלום", " é", "👍🏽", " &amp; ", "\n"]
    page = Page(token_map_html([sample_of(tokens)]))
    assert page.responses == ["".join(tokens)]
    spans = [
        given for tag, given in page.elements if tag == "span" and re.fullmatch(r"c\d+( n)?", given.get("class", ""))
    ]
    assert len(spans) == len(tokens) - 2
    assert [given["data-n"] for given in spans if "data-n" in given] == ["3"]
    assert [place for place, given in enumerate(spans) if given["class"].endswith(" n")] == [1, 9]


def test_control_characters_are_shown_as_pictures() -> None:
    page = Page(token_map_html([sample_of(["a\x00\x1b", "\r", "\x7f", "\tb"])]))
    assert page.responses == ["a\u2400\u241b\u240d\u2421\tb"]


def test_numbers_and_maps_are_those_that_were_given() -> None:
    sample = sample_of(["a", "b", "c"], num_images=2)
    sample = replace(sample, vgr=[float("nan"), 0.123456, 2.0])
    (data,) = Page(token_map_html([sample])).data
    assert data["weights"] == pytest.approx(sample.weights, rel=5e-3)
    assert data["vgr"] == [None, 0.123, 2.0] and data["gap"] is None
    looks = sum(one.values.sum(axis=(1, 2)) for one in sample.maps)
    assert data["looks"] == pytest.approx(looks, rel=5e-3)
    for found, given in zip(data["pictures"], sample.maps, strict=True):
        levels = np.frombuffer(base64.b64decode(found["data"]), np.uint8).reshape(-1, found["rows"], found["columns"])
        maps = np.concatenate([given.values, given.values.mean(axis=0, keepdims=True)])
        expected = maps / maps.max(axis=(1, 2), keepdims=True)
        assert levels.shape == (4, 4, 4) and found["stride"] == 1
        assert levels / 255 == pytest.approx(expected, abs=0.5 / 255 + 1e-6)


def test_an_empty_response_has_images_without_attention() -> None:
    sample = replace(sample_of([], num_images=2), reward=float("nan"), advantage=-0.0)
    html = token_map_html([sample])
    (data,) = Page(html).data
    assert Page(html).responses == [""] and data["looks"] == [] and data["weights"] == []
    for found in data["pictures"]:
        assert base64.b64decode(found["data"]) == bytes(found["rows"] * found["columns"]) and found["stride"] == 1
    assert '<dd dir="auto">undefined</dd>' in html and '<dd dir="auto">0</dd>' in html


def test_tokens_that_share_a_character_have_the_colour_of_their_mean_weight() -> None:
    sample = TokenMap(["好", "", "a"], [0.2, 1.8, 3.0], [1.0, 1.0, 1.0], "?")
    page = Page(token_map_html([sample], bounds=BOUNDS))
    colours = [given["class"] for tag, given in page.elements if tag == "span" and given.get("class") in ("c5", "c10")]
    assert colours == ["c5", "c10"]


def test_colours_run_from_the_lower_bound_over_one_to_the_upper() -> None:
    middle = COLOURS // 2
    ends = [colour_of(weight, BOUNDS) for weight in (0.0, 0.2, 1.0, 3.0, 50.0)]
    assert ends == [0, 0, middle, COLOURS - 1, COLOURS - 1]
    numbers = [colour_of(weight, BOUNDS) for weight in np.geomspace(0.2, 3.0, 200)]
    assert numbers == sorted(numbers) and set(numbers) == set(range(COLOURS))
    assert all(colour_of(float(weight), BOUNDS) == int(name[1:]) for name, weight in colour_scale(BOUNDS))
    assert colour_of(0.5, (0.0, 3.0)) < middle and colour_of(2.0, (0.5, 1.0)) == COLOURS - 1


def test_a_long_response_shows_its_beginning_and_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_map, "MOST_TOKENS", 12)
    tokens = [f"<{number}>" for number in range(20)]
    long, short = Page(token_map_html([sample_of(tokens, 1), sample_of(["a", "b"])])).data
    assert len(long["weights"]) == 10 and long["gap"] == [7, 10] and len(short["weights"]) == 2
    page = Page(token_map_html([sample_of(tokens, 1), sample_of(["a", "b"])]))
    assert page.responses[0] == "".join(tokens[:7]) + "… 10 tokens not shown …" + "".join(tokens[-3:])


@pytest.mark.parametrize("shape", [(40, 3, 48), (300, 2, 32), (4000, 1, 16)])
def test_thirty_two_samples_are_below_five_megabytes(shape: tuple[int, int, int]) -> None:
    """Pictures of noise, which compress worst; a map that is shrunk keeps where the most attention lies."""
    num_tokens, num_images, side = shape
    uris = iter(picture_uris([random_image((500, 400), index) for index in range(32 * num_images)]))
    samples = []
    for number in range(32):
        sample = sample_of(["&lt;你好"] * num_tokens, 1, side, number)
        values = np.full((num_tokens, side, side), 0.01, dtype=np.float32)
        values[:, 0, side - 1] = 1.0
        maps = [PictureMap(values, WHOLE)] * num_images
        samples.append(replace(sample, images=[next(uris) for _ in maps], maps=maps, prompt="你" * 20_000))
    html = token_map_html(samples)
    assert len(html.encode()) < 5_000_000
    picture = Page(html).data[0]["pictures"][0]
    levels = np.frombuffer(base64.b64decode(picture["data"]), np.uint8).reshape(
        -1, picture["rows"], picture["columns"]
    )
    assert all(one.argmax() == picture["columns"] - 1 for one in levels)


def test_a_picture_becomes_smaller_where_many_share_the_page() -> None:
    image = random_image((2000, 1000), 0)
    alone, shared = picture_uris([image])[0], picture_uris([image] * 64)
    assert len(alone) < 81_000 and sum(map(len, shared)) < 1_250_000
    assert alone.startswith("data:image/jpeg;base64,") and len(shared[0]) < len(alone)


def luminance(colour: str) -> float:
    """Relative, of #rrggbb; source: WCAG 2.2."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_enough_contrast_and_colours_differ_in_lightness(scheme: str) -> None:
    style = TEMPLATES.loader.get_source(TEMPLATES, "token_map.css")[0]
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    named = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", blocks[0 if scheme == "light" else 1]))
    tokens = [named[f"c{number}"] for number in range(COLOURS)]
    assert min(contrast(named["ink"], colour) for colour in (*tokens, named["page"], named["panel"])) >= 4.5
    assert contrast(named["soft"], named["page"]) >= 4.5
    assert contrast(named["mark"], named["page"]) >= 3
    distances = [contrast(colour, named["page"]) for colour in tokens]
    middle = COLOURS // 2
    assert distances[: middle + 1] == sorted(distances[: middle + 1], reverse=True)
    assert distances[middle:] == sorted(distances[middle:])
