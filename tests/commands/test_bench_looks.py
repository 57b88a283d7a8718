"""No two methods of a bench look alike, in its picture as on its page, for eyes without colours too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from made_bench import bench, made_rows, many_methods
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color, to_hex
from matplotlib.figure import Figure

import agssd.commands.report as report
from agssd.commands.bench import curves
from agssd.commands.bench.cells import list_cells
from agssd.commands.bench.looks import COLOURS, look
from agssd.commands.bench.settings import Readout


def test_look__of_many_methods__no_two_alike() -> None:
    assert len({look(number) for number in range(64)}) == 64
    for first in range(48):  # any 16 in a row, in grey
        assert len({(one.path, one.hollow) for one in map(look, range(first, first + 16))}) == 16
    assert [look(number).colour for number in range(8)] == list(range(8))


def test_colours__are_those_of_the_page() -> None:
    style = (Path(report.__file__).parent / "report.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"--s(\d): (#\w{6})", style.partition("@media (prefers-color-scheme: dark)")[0]))
    assert light == {str(number): colour for number, colour in enumerate(COLOURS)}


def test_draw__more_methods_than_colours__a_look_each_in_panels_and_legend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []

    def canvas(figure: Figure) -> FigureCanvasAgg:
        drawn.append(figure)
        return FigureCanvasAgg(figure)

    monkeypatch.setattr(curves, "FigureCanvasAgg", canvas)
    readouts = {name: Readout(["--config", "l.yaml"], [10]) for name in ("linear", "frozen")}
    settings = bench(methods=many_methods(13), readouts=readouts, labels=[2, 4], draws=2)
    rows = [row | {"seconds": 1.0} for row in made_rows(list_cells(settings, "", tmp_path), {})]
    curves.draw(settings, rows, tmp_path / "curves.png")
    (figure,) = drawn
    panels = [{str(one.get_label()): one.lines[0] for one in axis.containers} for axis in figure.axes]
    assert len(panels) == 2 and (tmp_path / "curves.png").stat().st_size > 10_000
    found = [
        {
            name: (to_hex(line.get_color()), line.get_marker(), same_color(line.get_markerfacecolor(), "white"))
            for name, line in lines.items()
        }
        for lines in panels
    ]
    assert found[0] == found[1] and list(found[0]) == list(settings.methods)
    assert len({look[1:] for look in found[0].values()}) == 13
    for number, (colour, marker, hollow) in enumerate(found[0].values()):
        own = look(number)
        assert (colour, marker, hollow) == (COLOURS[own.colour], own.marker, own.hollow)
    words = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert words == list(settings.methods)
    for lines in panels:  # marks of a column stand side by side
        starts = sorted(line.get_xdata()[0] for line in lines.values())
        assert all(after - before > 0.03 for before, after in zip(starts, starts[1:], strict=False))
