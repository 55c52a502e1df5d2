# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_pages.py
"""The pages in a real browser: Debian's Chromium without a screen, driven by Selenium. Skipped where there is none."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement

from tests.test_token_map import sample_of
from verl.report.curves import History
from verl.report.run_page import SampleSet, run_page
from verl.report.token_map import COLOURS, TokenMap, colour_scale
from verl.report.token_map_image import COLOURS as COLOURS_OF_PICTURES

BOUNDS = (0.2, 3.0)
ENOUGH_CONTRAST = 4.5
"""Of text on its ground, WCAG 2.2 level AA (1.4.3)."""

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,900",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[WebDriver]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def sample() -> TokenMap:
    """Tokens that look at one field after another; the second and third share a character."""
    sample = sample_of(["It", "你", "", " is", " 7", "."], num_images=2)
    for place, one in enumerate(sample.maps):
        one.values[:] = 0.01
        for token in range(len(sample.tokens)):
            one.values[token].reshape(-1)[token + place] = 1.0
    return replace(sample, title="Sample 1", answer="7", reward=1.0, advantage=0.5)


@pytest.fixture
def page(browser: WebDriver, sample: TokenMap, tmp_path: Path) -> WebDriver:
    history = History({step: {"reward/overall": step / 10, "val/reward_score": step / 12} for step in range(8)})
    sets = [SampleSet("Held-out responses, step 7", [sample, replace(sample, images=(), maps=())])]
    path = tmp_path / "report.html"
    path.write_text(run_page("project/run", ["A note."], history, sets, BOUNDS), "utf-8")
    set_scheme(browser, "light")
    browser.get(path.as_uri())
    return browser


def set_scheme(browser: WebDriver, scheme: str, media: str = "") -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})


def canvas_of(browser: WebDriver, number: int) -> np.ndarray:
    """(rows, columns), how opaque the overlay of an image is."""
    script = (
        "const canvas = document.querySelectorAll('canvas')[arguments[0]];"
        "const all = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;"
        "return [canvas.height, canvas.width, Array.from(all.filter((_, place) => place % 4 === 3))];"
    )
    rows, columns, values = browser.execute_script(script, number)
    return np.array(values).reshape(rows, columns)


def tokens_of(browser: WebDriver) -> list[WebElement]:
    return browser.find_elements(By.CSS_SELECTOR, ".sample:first-of-type .response span")


def tip_of(browser: WebDriver) -> str:
    tip = browser.find_element(By.ID, "tip")
    return tip.text if tip.is_displayed() else ""


def test_the_page_opens_from_disk_without_a_word_in_the_console_and_shows_its_curves(page: WebDriver) -> None:
    assert page.get_log("browser") == []
    pictures = page.find_elements(By.CSS_SELECTOR, ".chart img")
    assert len(pictures) == 2 and all(
        page.execute_script("return arguments[0].naturalWidth", one) > 0 for one in pictures
    )
    assert all(image.size["width"] > 50 for image in page.find_elements(By.CSS_SELECTOR, ".frame img"))
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_a_token_under_the_cursor_shows_its_numbers_and_where_it_looks(page: WebDriver, sample: TokenMap) -> None:
    whole = canvas_of(page, 0)
    assert tip_of(page) == ""
    for place, number in ((0, 0), (3, 4)):  # of the pieces, and of the tokens
        ActionChains(page).move_to_element(tokens_of(page)[place]).perform()
        tip = tip_of(page)
        assert f"token {number + 1} · weight {sample.weights[number]:.3g} · VGR {sample.vgr[number]:.3g}" in tip
        for image in (0, 1):
            shown = canvas_of(page, image)
            assert np.argmax(shown) == number + image and shown.max() > 3 * np.median(shown)
    shared = tokens_of(page)[1]
    assert shared.text == "你"
    ActionChains(page).move_to_element(shared).perform()
    assert tip_of(page).startswith("tokens 2 to 3 · weight ")
    ActionChains(page).move_to_element(page.find_element(By.TAG_NAME, "h1")).perform()
    assert tip_of(page) == "" and (canvas_of(page, 0) == whole).all()


def test_the_arrow_keys_step_through_the_tokens_and_escape_leaves(page: WebDriver) -> None:
    response = page.find_element(By.CSS_SELECTOR, ".response")
    response.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert tip_of(page).startswith("token 4 ")
    response.send_keys(Keys.ARROW_LEFT)
    assert tip_of(page).startswith("tokens 2 to 3 ")
    response.send_keys(Keys.ESCAPE)
    assert tip_of(page) == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_enough_contrast_in_light_and_dark(page: WebDriver, scheme: str) -> None:
    """The response's letters on each colour of the scale, and all other texts on their ground."""
    set_scheme(page, scheme)
    swatches = page.find_elements(By.CSS_SELECTOR, ".legend .swatch")
    assert len(swatches) == COLOURS
    texts = page.find_elements(By.CSS_SELECTOR, "h1, h2, p, dt, dd, figcaption, .prompt, .response span, .hint")
    contrasts = {element.text[:30]: contrast_of(page, element) for element in (*swatches, *texts) if element.text}
    assert min(contrasts.values()) >= ENOUGH_CONTRAST, min(contrasts.items(), key=lambda item: item[1])
    grounds = [colour_on(swatch, "background-color") for swatch in swatches]
    lightness = [luminance(ground) for ground in grounds]
    middle = COLOURS // 2
    sides = (lightness[: middle + 1], lightness[middle:][::-1])
    rising = all(one < other for side in sides for one, other in zip(side, side[1:], strict=False))
    falling = all(one > other for side in sides for one, other in zip(side, side[1:], strict=False))
    assert rising if scheme == "light" else falling, "steps are told apart by lightness, not by hue alone"


def test_the_charts_follow_the_readers_scheme_and_paper_is_light(page: WebDriver) -> None:
    shown = {}
    for scheme, media in (("light", ""), ("dark", ""), ("dark", "print")):
        set_scheme(page, scheme, media)
        charts = page.find_elements(By.CSS_SELECTOR, ".chart:first-of-type img")
        shown[scheme, media] = [chart.get_attribute("class") for chart in charts if chart.is_displayed()]
    assert shown == {("light", ""): ["light"], ("dark", ""): ["dark"], ("dark", "print"): ["light"]}


def test_the_picture_for_loggers_has_the_colours_of_the_page(page: WebDriver) -> None:
    grounds = [colour_on(swatch, "background-color") for swatch in page.find_elements(By.CSS_SELECTOR, ".swatch")]
    assert grounds == [tuple(bytes.fromhex(colour[1:])) for colour in COLOURS_OF_PICTURES]
    assert [name for name, _ in colour_scale(BOUNDS)] == [f"c{place}" for place in range(COLOURS)]


def test_the_page_is_as_wide_as_a_telephone(page: WebDriver) -> None:
    metrics = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 390
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def colour_on(element: WebElement, name: str) -> tuple[int, int, int]:
    value = element.value_of_css_property(name)
    numbers = [float(number) for number in re.findall(r"[\d.]+", value)]
    assert len(numbers) == 3 or numbers[3] == 1, f"{value} is seen through"
    return tuple(round(number) for number in numbers[:3])


def contrast_of(browser: WebDriver, element: WebElement) -> float:
    """Of an element's letters on the ground behind them, as WCAG 2.2 defines it."""
    script = (
        "let one = arguments[0];"
        "while (one && getComputedStyle(one).backgroundColor === 'rgba(0, 0, 0, 0)') one = one.parentElement;"
        "return one;"
    )
    ground = browser.execute_script(script, element)
    light, dark = sorted((luminance(colour_on(element, "color")), luminance(colour_on(ground, "background-color"))))[
        ::-1
    ]
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: tuple[int, int, int]) -> float:
    """Relative luminance of WCAG 2.2."""
    shares = [value / 255 for value in colour]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
