"""The page of a bench in a real browser: figures of the tables, a chart for each readout, nothing sticks out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, chromium
from made_bench import bench, made_rows, many_methods, write_bench

from agssd.cli import main
from agssd.commands.bench.cells import Pool, list_cells
from agssd.commands.bench.kept import kept
from agssd.commands.bench.results import places, read_rows
from agssd.commands.bench.settings import Readout
from agssd.commands.bench.tables import compare, of_place
from agssd.commands.report.bench_page import _tiles, round_values


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Return a running browser."""
    with chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bench of which three runs are not done."""
    out = tmp_path_factory.mktemp("made") / "bench"
    write_bench(out, {"ours": 0.1, "unet": -0.1}, leave_out=3)
    return out


def test_tiles__a_pretraining_that_serves_every_fold_counts_once() -> None:
    settings = bench(num_folds=4)
    for pool, hours in ((None, "2.7"), (Pool(("a.h5",), "m"), "0.7")):  # 2 methods, 3 seeds, 400 s each
        rows = [row | {"seconds": 1.0} for row in made_rows(list_cells(settings, "c.h5", Path("out"), "", pool), {})]
        assert f"<dt>hours of pretraining</dt><dd>{hours}</dd>" in _tiles(settings, rows)


def looks(browser: Browser) -> dict[str, set[tuple[str, str, bool]]]:
    """Return by method every (colour, shape, hollow) that it has in the charts and the legends of the page."""
    told = """[...document.querySelectorAll('figure.spread .dot')].map((dot) => {
        const style = getComputedStyle(dot), hollow = style.stroke !== 'none';
        const words = dot.querySelector('title') || dot.closest('.key');
        return [words.textContent.split(',')[0], hollow ? style.stroke : style.fill, dot.getAttribute('d'),
                hollow && style.fill !== style.stroke]; })"""
    found: dict[str, set[tuple[str, str, bool]]] = {}
    for method, colour, shape, hollow in browser.run(told):
        found.setdefault(method, set()).add((colour, shape, hollow))
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_bench_page__more_methods_than_colours__each_has_one_look_of_its_own(
    browser: Browser, tmp_path: Path, scheme: str
) -> None:
    methods = many_methods(13)
    readouts = {"linear": Readout(["--config", "l.yaml"], [10])}
    write_bench(tmp_path / "bench", {"m1": 0.1}, methods=methods, readouts=readouts, labels=[2, 4], draws=2)
    page = tmp_path / "bench.html"
    assert main(["report", str(tmp_path / "bench"), "--out", str(page)]) == 0
    browser.open(page, 390, scheme=scheme)
    found = looks(browser)
    assert set(found) == set(methods) and all(len(one) == 1 for one in found.values())
    assert len({look[1:] for one in found.values() for look in one}) == 13, "told apart even without colours"
    counts = "[...document.querySelectorAll('figure.spread')].map((f) => f.querySelectorAll('.key').length)"
    assert browser.run(counts) == [13, 12]
    keys = "[...document.querySelectorAll('.key')].map((k) => k.getBoundingClientRect())"
    assert browser.run(f"{keys}.every((box) => box.left >= 0 && box.right <= 390 && box.height < 40)")
    apart = """[...document.querySelectorAll('.spread > svg')].every((svg) => {
        const middles = [...svg.querySelectorAll('.dot')].map((dot) => dot.getBoundingClientRect());
        return new Set(middles.map((box) => Math.round(box.left + box.width / 2))).size === middles.length; })"""
    assert browser.run(apart), "side by side"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_bench_page__shows_every_readout(
    browser: Browser, folder: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    page = tmp_path / "bench.html"
    assert main(["report", str(folder), "--out", str(page), "--title", "Few labels"]) == 0
    browser.open(page, width, scheme=scheme)
    assert browser.run("document.querySelector('h1').textContent") == "Few labels"
    assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    boxes = browser.run("[...document.querySelectorAll('.spread > svg')].map((s) => s.getBoundingClientRect().width)")
    assert len(boxes) == 6 and min(boxes) > 250
    dots = browser.run("[...document.querySelectorAll('.spread > svg')].map((s) => s.querySelectorAll('.dot').length)")
    pairs = [dots[0::2], dots[1::2]]
    assert pairs[0] == [4 * 3, 4 * 3, 3 * 3 - 3], "the linear readout of all labels lacks its last seed"
    assert pairs[1] == [3 * 3, 3 * 3, 2 * 3 - 2], "ours against each other method"
    heights = "[...document.querySelectorAll('svg text')].map((t) => t.getBoundingClientRect().height)"
    assert min(browser.run(heights)) > 10, "letters can be read"
    inside = """[...document.querySelectorAll('.dot')].every((c) => {
        const dot = c.getBoundingClientRect(), svg = c.closest('svg').getBoundingClientRect();
        return dot.width > 4 &&
            dot.left >= svg.left && dot.right <= svg.right && dot.top >= svg.top && dot.bottom <= svg.bottom; })"""
    assert browser.run(inside)
    words = """[...document.querySelectorAll('.spread > svg text')].every((t) => {
        const word = t.getBoundingClientRect(), svg = t.closest('svg').getBoundingClientRect();
        return word.left >= svg.left && word.right <= svg.right; })"""
    assert browser.run(words), "no figure is cut off"
    tables = "[...document.querySelectorAll('.of-methods')].every((t) => t.scrollHeight <= t.clientHeight)"
    assert browser.run(tables), "no row is hidden"
    shown = looks(browser)
    assert set(shown) == {"scratch", "unet", "ours", "rival"}
    assert all(len(found) == 1 for found in shown.values()), "a look for each method, in marks and legends"
    assert len({colour for found in shown.values() for colour, _, _ in found}) == 4
    assert "3 of 363 runs are not done" in browser.run("document.querySelector('.missing').textContent")
    assert not browser.complaints


@pytest.mark.parametrize("width", [1280, 390])
def test_bench_page__figures_by_class_are_opened_below_each_readout(
    browser: Browser, tmp_path: Path, width: int
) -> None:
    classes = {str(number): 0.4 + number / 100 for number in range(1, 12)}
    write_bench(tmp_path / "bench", {}, leave_out=1, classes=classes)
    page = tmp_path / "bench.html"
    assert main(["report", str(tmp_path / "bench"), "--out", str(page)]) == 0
    browser.open(page, width)
    browser.run("document.querySelector('#part2 summary').click()")
    table = "[...document.querySelectorAll('#part2 details h3')].map((h) => [h.textContent, ...[...h.nextSibling"
    shown = browser.run(table + ".querySelectorAll('tr')].map((r) => r.textContent)])")
    of_each = "".join(f"{value:.3f}" for value in classes.values())
    rows = ["method1234567891011", *(name + of_each for name in ("scratch", "ours", "rival"))]
    assert shown[0] == ["2 subjects", *rows]
    assert shown[2] == ["100% of the labels", *rows[:-1]], "a method of which a run is missing is left out"
    assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert not browser.complaints


def test_bench_page__by_keyboard(browser: Browser, folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "bench.html"
    assert main(["report", str(folder), "--out", str(page)]) == 0
    browser.open(page, 390, scheme="dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    before = browser.run(colour)
    browser.run("document.getElementById('theme').focus()")
    browser.press("Enter", "\r")
    assert browser.run(colour) != before
    browser.run("document.querySelector('#part0 .scroll').focus()")
    browser.press("ArrowRight")
    browser.wait("document.querySelector('#part0 .scroll').scrollLeft > 0")  # a table that is wider than a phone
    assert not browser.complaints


def test_bench_page__claims_what_the_tables_claim(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "bench.html"
    assert main(["report", str(folder), "--out", str(page)]) == 0
    text = page.read_text()
    settings = bench()
    rows = read_rows(kept(folder).cells(folder))
    found = {place: of_place(settings, rows, place) for place in places(settings)}
    compared = compare(settings, found)
    unclear = sum(p >= 0.05 for _, p in compared.values())
    assert 0 < unclear < len(compared)
    assert text.count(">no difference shown, p = ") == unclear
    assert text.count("<b>") == len(compared) - unclear
    assert str(tmp_path) not in text and str(folder) not in text


def test_bench_page__at_a_glance__says_of_each_rival_what_intervals_and_corrected_p_say(
    folder: Path, tmp_path: Path
) -> None:
    page = tmp_path / "bench.html"
    assert main(["report", str(folder), "--out", str(page)]) == 0
    table = page.read_text().partition('<section id="glance">')[2].partition("</section>")[0]
    assert re.findall("scope=col>over ([^<]+)<", table) == ["scratch", "unet", "rival"]
    settings = bench()
    rows = read_rows(kept(folder).cells(folder))
    compared = compare(settings, {place: of_place(settings, rows, place) for place in places(settings)})
    ahead = [found for (first, _, _), found in compared.items() if first == "ours"]
    corrected = sum(p < 0.05 for _, p in ahead)
    single = sum(p >= 0.05 and i.low * i.high > 0 for i, p in ahead)
    said = re.findall("<small>([^<]+)</small>", table)
    assert said.count("corrected") == corrected > 0 and said.count("single") == single
    assert len(said) == len(ahead) == corrected + single + said.count("neither")
    for kind, told in re.findall('<td class="([^"]*)">[^<]*<small>([^<]+)</small>', table):
        assert (kind == "note") == (told != "corrected"), "colour is for what stands"
    assert sorted(re.findall(r"([+-][\d.]+) <small>", table)) == sorted(f"{i.mean:+.3f}" for i, _ in ahead)


def test_bench_page__one_method_beside_random_weights__is_shown_at_a_glance(tmp_path: Path) -> None:
    methods = {name: bench().methods[name] for name in ("scratch", "ours")}
    for leave_out, shown in ((0, 1), (11, 0)):
        readouts = {"linear": Readout(["--config", "l.yaml"], [10])}
        folder, page = tmp_path / str(leave_out), tmp_path / "bench.html"
        given = {"methods": methods, "readouts": readouts, "labels": [2], "draws": 2}
        write_bench(folder, {"ours": 0.1}, leave_out=leave_out, **given)
        assert main(["report", str(folder), "--out", str(page)]) == 0
        text = page.read_text()
        assert (
            text.count(">over scratch<") == text.count('id="glance"') == text.count("<span>Dice of ours less") == shown
        )


def test_bench_page__says_what_was_compared(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "bench.html"
    assert main(["report", str(folder), "--out", str(page)]) == 0
    assert "somebody" not in page.read_text(encoding="utf-8"), "of a path no more than its name"
    text = re.sub("<[^>]+>", " ", page.read_text(encoding="utf-8").partition('<section id="what">')[2])
    said = " ".join(text.split())
    for words in (
        "scratch random weights",
        "unet full: --config unet.yaml",
        "ours 5 steps of --config a.yaml",
        "rival 7 steps of --config b.yaml",
        "full labels 2, 25%, 100%; 10, 30 steps of --config f.yaml",
        "cases 20 of 20 subjects modality MRI",
        "machine a processor",
        "commit c commit of pretraining c0",
        "date 2026-01-31",
    ):
        assert words in said
    for wrong in (["--cache", "c.h5"], ["--cases", "2"], ["--nifti", str(tmp_path)], ["--device", "cpu"]):
        assert main(["report", str(folder), "--out", str(tmp_path / "no.html"), *wrong]) == 1
        assert f"leave {wrong[0]} out" in capsys.readouterr().err and not (tmp_path / "no.html").exists()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.19, 0.73, [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),
        (-0.081, 0.17, [-0.05, 0.0, 0.05, 0.1, 0.15]),
        (0.7401, 0.7702, [0.75, 0.76, 0.77]),
        (-1.2, 3.9, [-1.0, 0.0, 1.0, 2.0, 3.0]),
    ],
)
def test_round_values__are_round_and_few(low: float, high: float, expected: list[float]) -> None:
    assert round_values(low, high) == pytest.approx(expected, abs=1e-12)


def test_report__a_bench_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench"
    write_bench(out, {}, leave_out=363)
    assert main(["report", str(out), "--out", str(tmp_path / "x.html")]) == 1
    assert "no cell of the bench is done yet" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()
