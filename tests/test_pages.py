# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_pages.py
"""The pages in a real browser, Debian's Chromium without a screen, driven by Playwright; skipped without one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from tests.test_token_map import sample_of
from verl.report.curves import History
from verl.report.run_page import SampleSet, run_page
from verl.report.token_map import COLOURS, TokenMap, colour_scale
from verl.report.token_map_image import COLOURS as COLOURS_OF_PICTURES

BOUNDS = (0.2, 3.0)
ENOUGH_CONTRAST = 4.5
"""Of text on its ground, WCAG 2.2 level AA (1.4.3)."""

OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-component-update", "--disable-sync"]

OPACITY = """(canvas) => {
    const all = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    return [canvas.height, canvas.width, Array.from(all.filter((_, place) => place % 4 === 3))];
}"""

GROUND = """(one) => {
    const ground = (element) => getComputedStyle(element).backgroundColor;
    while (ground(one) === 'rgba(0, 0, 0, 0)') one = one.parentElement;
    return ground(one);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    # scripts/run_tests.sh installs it where it has the rights; elsewhere a browser is not the package's to demand.
    if chromium is None:
        pytest.skip("needs Debian's package chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def sample() -> TokenMap:
    """Tokens that look at one field after another; the second and third share a character."""
    sample = sample_of(["It", "你", "", " is", " 7", "."], num_images=3)
    for place, one in enumerate(sample.maps):
        one.values[:] = 0.01
        for token in range(len(sample.tokens)):
            one.values[token].reshape(-1)[token + place] = 1.0
    return replace(sample, title="Sample 1", answer="7", reward=1.0, advantage=0.5)


@pytest.fixture
def page(browser: Browser, sample: TokenMap, tmp_path: Path) -> Iterator[Page]:
    history = History({step: {"reward/overall": step / 10, "val/reward_score": step / 12} for step in range(8)})
    sets = [SampleSet("Held-out responses, step 7", [sample, replace(sample, images=(), maps=())])]
    path = tmp_path / "report.html"
    notes = ["A note.", "/a/folder/of/models" * 9]
    path.write_text(run_page("project/run", notes, history, sets, BOUNDS), "utf-8")
    page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
    words: list[str] = []
    page.on("console", lambda message: words.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: words.append(str(error)))
    page.on("request", lambda request: words.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(path.as_uri())
    yield page
    assert words == [path.as_uri()], "the page asks for itself alone, and the console has no error"
    page.close()


def overlay_of(page: Page, image: int) -> np.ndarray:
    """(rows, columns), how opaque the overlay of an image is."""
    rows, columns, values = page.locator("canvas").nth(image).evaluate(OPACITY)
    return np.array(values).reshape(rows, columns)


def tokens_of(page: Page) -> Locator:
    return page.locator(".sample").first.locator(".response span")


def tip_of(page: Page) -> str:
    tip = page.locator("#tip")
    return tip.inner_text() if tip.is_visible() else ""


def test_the_page_shows_its_curves_and_pictures_and_is_no_wider_than_the_window(page: Page) -> None:
    charts = page.locator(".chart img")
    assert charts.count() == 2 and charts.evaluate_all("all => all.every(one => one.naturalWidth > 0)")
    assert page.locator(".frame img").evaluate_all("all => all.length === 3 && all.every(one => one.width > 50)")
    assert len({round(box["width"]) for frame in page.locator(".frame").all() if (box := frame.bounding_box())}) == 1
    for width in (1200, 390):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_token_under_the_cursor_shows_its_numbers_and_where_it_looks(page: Page, sample: TokenMap) -> None:
    whole = overlay_of(page, 0)
    assert tip_of(page) == ""
    for place, number in ((0, 0), (2, 3), (3, 4)):  # of the pieces, and of the tokens
        tokens_of(page).nth(place).hover()
        told = f"token {number + 1} · weight {sample.weights[number]:.3g} · VGR {sample.vgr[number]:.3g}"
        assert tip_of(page).startswith(told)
        for image in (0, 1, 2):
            shown = overlay_of(page, image)
            assert np.argmax(shown) == number + image and shown.max() > 3 * np.median(shown)
    assert tokens_of(page).nth(1).inner_text() == "你"
    tokens_of(page).nth(1).hover()
    assert tip_of(page).startswith("tokens 2 to 3 · weight ")
    page.locator("h1").hover()
    assert tip_of(page) == "" and (overlay_of(page, 0) == whole).all()


def test_the_arrow_keys_step_through_the_tokens_and_escape_leaves(page: Page) -> None:
    response = page.locator(".response").first
    for key, told in (("ArrowRight", "token 1 "), ("ArrowRight", "tokens 2 to 3 "), ("ArrowRight", "token 4 ")):
        response.press(key)
        assert tip_of(page).startswith(told)
    response.press("ArrowLeft")
    assert tip_of(page).startswith("tokens 2 to 3 ")
    response.press("Escape")
    assert tip_of(page) == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_enough_contrast_in_light_and_dark(page: Page, scheme: str) -> None:
    """Letters on each colour of the scale, and all other texts on their ground; the scale is told by lightness too."""
    page.emulate_media(color_scheme=scheme)
    page.mouse.move(0, 0)
    shown = "h1, h2, p, dt, dd, figcaption, .legend .swatch, .meaning, .hint, .prompt, .response span"
    texts = page.locator(shown).all()
    contrasts = {text.inner_text()[:30]: contrast_of(text) for text in texts}
    assert len(contrasts) > 20
    assert min(contrasts.values()) >= ENOUGH_CONTRAST, min(contrasts.items(), key=lambda item: item[1])
    lightness = [luminance(swatch.evaluate(GROUND)) for swatch in page.locator(".swatch").all()]
    middle = COLOURS // 2
    for side in (lightness[: middle + 1], lightness[middle:][::-1]):
        assert side == sorted(side, reverse=scheme == "dark") and len(set(side)) == len(side)


def test_the_charts_follow_the_readers_scheme_and_paper_is_light(page: Page) -> None:
    shown = {}
    for scheme, media in (("light", "screen"), ("dark", "screen"), ("dark", "print")):
        page.emulate_media(color_scheme=scheme, media=media)
        charts = page.locator(".chart").first.locator("img").all()
        shown[scheme, media] = [chart.get_attribute("class") for chart in charts if chart.is_visible()]
    assert list(shown.values()) == [["light"], ["dark"], ["light"]]
    ink, paper = page.locator("h1").evaluate("one => getComputedStyle(one).color"), page.locator("h1").evaluate(GROUND)
    assert luminance(ink) < 0.05 and luminance(paper) > 0.95
    assert page.locator(".meaning").is_visible() and not page.locator(".hint").is_visible()
    assert page.pdf().startswith(b"%PDF")


def test_the_picture_for_loggers_has_the_colours_of_the_page(page: Page) -> None:
    grounds = [numbers_of(swatch.evaluate(GROUND)) for swatch in page.locator(".swatch").all()]
    assert grounds == [[*bytes.fromhex(colour[1:])] for colour in COLOURS_OF_PICTURES]
    assert [name for name, _ in colour_scale(BOUNDS)] == [f"c{place}" for place in range(COLOURS)]


def contrast_of(text: Locator) -> float:
    """Of an element's letters on the ground behind them, as WCAG 2.2 defines it."""
    ink, ground = luminance(text.evaluate("one => getComputedStyle(one).color")), luminance(text.evaluate(GROUND))
    return (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05)


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2.2."""
    shares = [value / 255 for value in numbers_of(colour)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def numbers_of(colour: str) -> list[float]:
    """Red, green and blue, 0 to 255, of a colour that is not seen through."""
    assert colour.startswith("rgb("), colour
    return [float(number) for number in re.findall(r"[\d.]+", colour)]
