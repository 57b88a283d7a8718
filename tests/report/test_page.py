"""The page in a real browser: drawn without a complaint, moved by the keyboard, in both schemes and on a phone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, chromium

UNFOLD = "document.querySelectorAll('details').forEach((fold) => { fold.open = true; })"
ALL_DRAWN = "document.documentElement.dataset.drawn === 'all'"
# of each chart: width and height of its drawing, how many lines it has, whether each goes somewhere, and its words
CHARTS = """[...document.querySelectorAll('figure.chart')].map((figure) => {
  const svg = figure.querySelector('svg');
  const lines = svg ? [...svg.querySelectorAll('path.line')] : [];
  return [svg ? svg.clientWidth : 0, svg ? svg.clientHeight : 0, lines.length,
          lines.every((line) => /^M\\d+\\.\\d \\d+\\.\\d/.test(line.getAttribute('d'))),
          figure.querySelector('.plot').getAttribute('aria-label')];
})"""
# of each canvas: its width on the page and how many colours it holds
CANVASES = """[...document.querySelectorAll('canvas')].map((canvas) => {
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  const found = new Set();
  for (let i = 0; i < pixels.length; i += 4) found.add(pixels[i] * 65536 + pixels[i + 1] * 256 + pixels[i + 2]);
  return [canvas.clientWidth, found.size];
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Return a running browser."""
    with chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


def picture(browser: Browser, number: int) -> str:
    """Return what canvas ``number`` shows."""
    found: str = browser.run(f"document.querySelectorAll('canvas')[{number}].toDataURL()")
    return found


@pytest.mark.parametrize("name", ["pretrain", "segmentation"])
@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (1280, "light"),
        (390, "dark"),
        pytest.param(1280, "dark", marks=pytest.mark.slow),
        pytest.param(390, "light", marks=pytest.mark.slow),
    ],
)
def test_page__every_figure_is_drawn_and_nothing_sticks_out(
    browser: Browser, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    browser.open(pages[name], width, scheme=scheme)
    browser.wait(ALL_DRAWN)
    browser.run(UNFOLD)
    charts = "[...document.querySelectorAll('figure.chart')]"
    browser.wait(f"{charts}.every((figure) => figure.querySelector('svg'))")
    drawn = browser.run(CHARTS)
    assert len(drawn) >= (30 if name == "pretrain" else 1)
    for wide, high, lines, whole, words in drawn:
        assert wide > 200 and high > 100 and whole
        series = words.count(" at step ") / 2  # first and last value of each that is ever finite
        assert lines == series and (series or "never finite" in words), words
    canvases = browser.run(CANVASES)
    assert len(canvases) == (6 if name == "pretrain" else 9)  # 2 cases; or 2 cases and the only one tested
    assert all(wide > 80 and colours > 40 for wide, colours in canvases)
    sizes = browser.run(
        "[...document.querySelectorAll('img:not([hidden])')].map((i) => [i.naturalWidth, i.clientWidth])"
    )
    assert len(sizes) == (name == "pretrain") and all(min(size) > 300 for size in sizes)
    assert browser.run("document.documentElement.scrollWidth") == width
    light = browser.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((part) => part > 127)")
    assert light == (scheme == "light")
    assert browser.complaints == []


def test_page__theme_switch__turns_the_colours_and_back(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["pretrain"], scheme="dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    before = browser.run(colour)
    browser.run("document.getElementById('theme').focus()")
    browser.press("Enter", "\r")
    assert browser.run(colour) != before
    assert browser.run("document.getElementById('theme').textContent") == "Dark"
    browser.press("Enter", "\r")
    assert browser.run(colour) == before


def test_page__arrow_keys_on_a_slider__another_slice_and_its_words(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["pretrain"])
    browser.wait(ALL_DRAWN)
    before = [picture(browser, number) for number in range(3)]
    browser.run("document.querySelector('.plane input').focus()")  # axial
    browser.press("ArrowRight")
    after = [picture(browser, number) for number in range(3)]
    assert before[0] != after[0]
    assert before[1] != after[1] and before[2] != after[2]  # the line that shows where the axial slice lies
    at = browser.run("Number(document.querySelector('.plane input').value)")
    assert f"slice {at + 1} of 40" in browser.run("document.querySelector('canvas').ariaLabel")
    browser.press("ArrowLeft")
    assert [picture(browser, number) for number in range(3)] == before


def test_page__choice_by_keyboard__changes_what_is_laid_over(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["pretrain"])
    browser.wait(ALL_DRAWN)
    names = browser.run("[...document.querySelector('select').options].map((option) => option.text)")
    assert names[0].startswith("PCA") and any("attention" in name for name in names) and names[-1] == "nothing"
    shown = "document.querySelector('canvas').ariaLabel"
    seen = {picture(browser, 0)}
    browser.run("document.querySelector('select').focus()")
    for name in names[1:]:
        browser.press("ArrowDown")
        browser.wait(f"{shown}.includes({json.dumps(f': {name}, ')})")
        seen.add(picture(browser, 0))
    assert len(seen) == len(names)
    browser.press("ArrowUp")
    browser.wait(f"{shown}.includes({json.dumps(f': {names[-2]}, ')})")
    assert picture(browser, 0) in seen


def test_page__opacity_by_keyboard__from_the_scan_alone_to_the_layer_alone(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["pretrain"])
    browser.wait(ALL_DRAWN)
    value = "Number(document.querySelector('input.opacity').value)"
    at = {browser.run(value): picture(browser, 0)}
    browser.run("document.querySelector('input.opacity').focus()")
    for key in ("ArrowLeft", "Home", "End"):
        browser.press(key)
        at[browser.run(value)] = picture(browser, 0)
    assert list(at) == [60, 59, 0, 100] and len(set(at.values())) == 4
    browser.run("document.querySelector('select').focus()")
    browser.press("End")
    browser.wait("document.querySelector('canvas').ariaLabel.includes(': nothing, ')")
    assert picture(browser, 0) == at[0], "at 0 nothing of the layer is left"


def test_page__views__slider_shows_another_step(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["pretrain"])
    shown = "document.querySelector('.frames img:not([hidden])').dataset.step"
    assert browser.run(shown) == "1000"
    browser.run("document.getElementById('views-step').focus()")
    browser.press("ArrowLeft")
    earlier = browser.run(shown)
    assert int(earlier) < 1000
    assert f"step {earlier}" in browser.run("document.querySelector('.frames output').textContent")


def test_page__charts__read_zoom_smooth_and_log_by_keyboard_and_mouse(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["pretrain"])
    browser.wait(ALL_DRAWN)
    readout = "document.querySelector('figure.chart .readout').textContent"
    path = "document.querySelector('figure.chart path.line:not(.raw)').getAttribute('d')"
    browser.run("document.querySelector('.plot').focus()")
    browser.press("Home")
    assert browser.run(readout).startswith("step 0")
    browser.press("ArrowRight")
    assert browser.run(readout).startswith("step 1")
    whole = browser.run(path)
    corner = "(({ left, top, width }) => [left, top, width])(document.querySelector('.plot').getBoundingClientRect())"
    box = browser.run(corner)
    browser.drag((box[0] + 0.5 * box[2], box[1] + 80), (box[0] + 0.7 * box[2], box[1] + 80))
    browser.wait("!document.getElementById('reset').disabled")
    assert browser.run(path) != whole
    browser.run("document.querySelector('.plot').focus()")
    browser.press("Escape")
    assert browser.run("document.getElementById('reset').disabled") and browser.run(path) == whole
    browser.run("document.getElementById('log').focus()")
    browser.press(" ", " ")
    logarithmic = browser.run(path)
    assert logarithmic != whole
    browser.press(" ", " ")
    browser.run("document.getElementById('smoothing').focus()")
    browser.press("End")
    assert browser.run(path) not in (whole, logarithmic)
    assert browser.run("document.querySelectorAll('figure.chart path.raw').length") > 0
    assert browser.complaints == []


def test_page__keyboard_reaches_every_control_and_shows_where_it_is(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["segmentation"])
    browser.wait(ALL_DRAWN)
    controls = "[...document.querySelectorAll('a[href], button:not([disabled]), input, select, summary, [tabindex]')]"
    shown = f"{controls}.filter((e) => e.checkVisibility())"
    wanted = browser.run(f"{shown}.length")
    assert wanted > 20
    seen = []
    for _ in range(wanted):
        browser.press("Tab")
        seen.append(browser.run(f"{shown}.indexOf(document.activeElement)"))
        assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert sorted(seen) == list(range(wanted))


def test_page__everything_has_words(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["pretrain"])
    browser.wait(ALL_DRAWN)
    silent = browser.run(
        "[...document.querySelectorAll('img, canvas, .plot, svg[role=img]')]"
        ".filter((e) => !(e.alt || e.getAttribute('aria-label'))).length"
        " + [...document.querySelectorAll('input, select')].filter((e) => !e.labels.length && !e.hidden).length"
    )
    assert silent == 0
