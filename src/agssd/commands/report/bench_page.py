"""The report of a bench: what was compared; means and paired differences, drawn and in tables."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import agssd
from agssd.commands._page import page
from agssd.commands.bench.kept import KEPT, kept
from agssd.commands.bench.looks import Look, look
from agssd.commands.bench.results import Place, places, read_rows
from agssd.commands.bench.results import heading as heading_of
from agssd.commands.bench.settings import Bench
from agssd.commands.bench.tables import (
    ALPHA,
    NOTHING_YET,
    class_names,
    closing,
    compare,
    head,
    label,
    of_classes,
    of_place,
    probability,
    told_classes,
    told_interval,
)
from agssd.commands.report.bench_facts import what_was_compared
from agssd.commands.report.write import check_name, joined_script, save
from agssd.evaluation.statistics import Interval, crossed_mean

_WIDTH, _HEIGHT, _TOP, _BOTTOM = 640, 300, 12, 28
_LETTER = 13  # the widest figure in units of a chart, on a phone, where letters are largest
_Means = dict[Place, dict[str, Interval]]
_Compared = dict[tuple[str, str, Place], tuple[Interval, float]]


def is_bench(folder: Path) -> bool:
    """Return whether ``agssd bench`` wrote ``folder``."""
    return (folder / KEPT).is_file()


def write_bench(folder: Path, out: Path, title: str | None) -> str:
    """Write the page and return what was written, in words.

    Raises:
        ValueError: if there is nothing to show, or the page cannot be written.
    """
    check_name(out)
    settings = kept(folder)
    bench, cells = settings.bench, settings.cells(folder)
    rows = read_rows(cells)
    if not rows:
        raise ValueError(f"{folder}: no cell of the bench is done yet")
    found = {place: of_place(bench, rows, place) for place in places(bench)}
    means = {place: {name: crossed_mean(table) for name, table in tables.items()} for place, tables in found.items()}
    compared = compare(bench, found)
    parts, links = [], []
    for number, ((readout, steps), group) in enumerate(groupby(found, key=lambda place: place[:2])):
        here = {place: means[place] for place in group}
        heading = escape(heading_of(readout, steps))
        links.append(f'<li><a href="#part{number}">{heading}</a></li>')
        own = {key: value for key, value in compared.items() if key[2] in here}
        body = _part(bench, here, own) + _by_class(bench, rows, list(here))
        parts.append(f'<section id="part{number}"><h2>{heading}</h2>{body}</section>')
    glance = _at_a_glance(bench, compared)
    if glance:
        links.insert(0, '<li><a href="#glance">At a glance</a></li>')
    links.append('<li><a href="#what">What was compared</a></li>')
    parts.append(f'<section id="what"><h2>What was compared</h2>{what_was_compared(settings, rows)}</section>')
    missing = len(cells) - len(rows)
    note = f'<p class="missing">{missing} of {len(cells)} runs are not done; what they belong to is left out.</p>'
    name = title or "Methods by few labels"
    here_folder = Path(__file__).parent
    text = page(
        f"{name}: agssd report",
        f"<h1>{escape(name)}</h1><p>{escape(head(bench, rows))}</p>"
        '<button type="button" id="theme" hidden>Dark</button>',
        f'{_tiles(bench, rows)}<nav aria-label="Parts"><ul>{"".join(links)}</ul></nav>{note if missing else ""}'
        f"{glance}{''.join(parts)}{_closing(bench, compared)}",
        f"<p>agssd {agssd.__version__} report, {time.strftime('%Y-%m-%d', time.gmtime())}.</p>",
        (here_folder / "report.css").read_text(encoding="utf-8"),
        joined_script(here_folder, ("base",)),
    )
    return save(out, text)


def _tiles(bench: Bench, rows: Sequence[dict[str, Any]]) -> str:
    hours = sum(row["seconds"] for row in rows) / 3600
    before = {
        (row["method"], row["seed"], row.get("pretraining_fold", row["fold"])): row["pretraining_seconds"]
        for row in rows
    }
    figures = {
        "runs": str(len(rows)),
        "methods": str(len(bench.methods)),
        "subjects measured": str(len({name for row in rows for name in row["subjects"]})),
        "hours of tasks": f"{hours:.1f}",
        "hours of pretraining": f"{sum(before.values()) / 3600:.1f}",
    }
    tiles = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures.items())
    return f'<dl class="tiles">{tiles}</dl>'


def _at_a_glance(bench: Bench, compared: _Compared) -> str:
    """Return what the leader is ahead of each other by, in one table; nothing where it has no figure."""
    ours = bench.leader
    others = [name for name in bench.methods if any(key[:2] == (ours, name) for key in compared)]
    if ours is None or not others:
        return ""
    rows = []
    for place in dict.fromkeys(key[2] for key in compared):
        cells = [_glance(compared.get((ours, name, place))) for name in others]
        rows.append((f"{heading_of(place.readout, place.steps)}: {label(place)}", cells))
    told = (
        f"What {ours} is ahead of each by. Corrected: p after correction for all differences below {ALPHA}; single: "
        "the interval of this one difference excludes 0, but p is not below it; neither: no difference shown."
    )
    table = _table("readout", [f"over {name}" for name in others], rows)
    card = f'<div class="card"><p class="note">{escape(told)}</p>{table}</div>'
    return f'<section id="glance"><h2>At a glance</h2>{card}</section>'


def _glance(found: tuple[Interval, float] | None) -> tuple[str, str]:
    """Return the class and the HTML of a difference without its interval: how far it is ahead, and what that says."""
    if found is None:
        return "", ""
    interval, p = found
    told = "corrected" if p < ALPHA else "single" if interval.excludes_zero else "neither"
    kind = "note" if told != "corrected" else "good" if interval.mean > 0 else "error"
    return kind, f"{interval.mean:+.3f} <small>{told}</small>"


def _part(bench: Bench, means: _Means, compared: _Compared) -> str:
    methods = [name for name in bench.methods if any(name in one for one in means.values())]
    if not methods:
        return f'<p class="missing">{NOTHING_YET}</p>'
    columns = [label(place) for place in means]
    body = _charts(bench, methods, means, compared) + _table("method", columns, _mean_rows(methods, means))
    return f'<div class="card">{body}{_table("difference", columns, _difference_rows(compared, list(means)))}</div>'


def _mean_rows(methods: Sequence[str], means: _Means) -> list[tuple[str, list[tuple[str, str]]]]:
    return [
        (name, [("", told_interval(one[name])) if name in one else ("", "") for one in means.values()])
        for name in methods
    ]


def _difference_rows(compared: _Compared, columns: Sequence[Place]) -> list[tuple[str, list[tuple[str, str]]]]:
    rows = []
    for first, second in dict.fromkeys(key[:2] for key in compared):
        cells = []
        for place in columns:
            interval, p = compared.get((first, second, place), (None, 1.0))
            if interval is None:
                cells.append(("", ""))
            elif p < ALPHA:
                kind = "good" if interval.mean > 0 else "error"
                cells.append((kind, f"<b>{told_interval(interval, '+')}</b><small>p {escape(probability(p))}</small>"))
            else:
                told = f"no difference shown, p {probability(p)}"
                cells.append(("", f'{told_interval(interval, "+")}<small class="note">{told}</small>'))
        rows.append((f"{first} − {second}", cells))
    return rows


def _by_class(bench: Bench, rows: Sequence[dict[str, Any]], columns: Sequence[Place]) -> str:
    """Return, to be opened, a table of classes for each amount of labels whose runs say them; else nothing."""
    tables = []
    for place in columns:
        found = of_classes(bench, rows, place)
        names = class_names(found)
        cells = [
            (who, [("", f"{its[name]:.3f}" if name in its else "") for name in names]) for who, its in found.items()
        ]
        if cells:
            tables.append(f"<h3>{escape(label(place))}</h3>{_table('method', names, cells)}")
    if not tables:
        return ""
    told = escape(told_classes(bench))
    return f'<details><summary>By class</summary><p class="note">{told}</p>{"".join(tables)}</details>'


def _table(name: str, columns: Sequence[str], rows: Sequence[tuple[str, list[tuple[str, str]]]]) -> str:
    if not rows:
        return ""
    heads = "".join(f"<th scope=col>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th scope=row>{escape(head)}</th>"
        + "".join(f'<td class="{kind}">{text}</td>' for kind, text in cells)
        + "</tr>"
        for head, cells in rows
    )
    return (
        f'<div class="scroll all of-methods" tabindex="0" role="region" aria-label="{name}s"><table><thead><tr>'
        f"<th scope=col>{name}</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _look(bench: Bench, method: str) -> Look:
    """Return a method's look, the same in every part of the page."""
    return look(list(bench.methods).index(method))


def _mark(look: Look, told: str = "") -> str:
    """Return a method's mark about the origin; ``told`` is HTML that a pointer on it shows."""
    title = f"<title>{told}</title>" if told else ""
    return f'<path class="dot{" hollow" * look.hollow}" d="{look.path}">{title}</path>'


def _charts(bench: Bench, methods: Sequence[str], means: _Means, compared: _Compared) -> str:
    """Return the means over the labels beside what the leader is ahead by; tables hold the same."""
    what = "Dice" if bench.figure == "dice" else "balanced accuracy"
    columns = list(means)
    lines = {name: {place: one[name] for place, one in means.items() if name in one} for name in methods}
    charts = _chart(
        bench, lines, columns, f"{what} over labelled subjects; bars are 95 % intervals, dashed without pretraining"
    )
    ours = bench.leader
    ahead: dict[str, dict[Place, Interval]] = {}
    for (first, second, place), (interval, _) in compared.items():
        if first == ours:
            ahead.setdefault(second, {})[place] = interval
    if ahead:
        lines = {name: ahead[name] for name in methods if name in ahead}
        charts += _chart(
            bench, lines, columns, f"{what} of {ours} less that of each, paired; above 0 {ours} is ahead", "+"
        )
    return f'<div class="pair">{charts}</div>'


def _chart(
    bench: Bench, lines: dict[str, dict[Place, Interval]], columns: Sequence[Place], title: str, sign: str = ""
) -> str:
    """Return a picture of means with their intervals, a line per method; ``sign`` "+" where they are differences."""
    intervals = [interval for line in lines.values() for interval in line.values()]
    low, high = min(i.low for i in intervals), max(i.high for i in intervals)
    if sign:
        low, high = min(low, 0.0), max(high, 0.0)
    pad = 0.06 * (high - low) or 0.01
    low, high = low - pad, high + pad
    ticks = {value: f"{value:{sign if value else ''}.3g}" for value in round_values(low, high)}
    left = 12 + _LETTER * max(map(len, ticks.values()))
    step = (_WIDTH - left - 12) / len(columns)
    share = min(0.8, max(0.5, 0.07 * len(lines)))  # of a column, where the methods stand beside one another

    def x(column: int, method: int) -> float:
        return left + step * (column + 0.5) + share * step * ((method + 0.5) / len(lines) - 0.5)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    marks = []
    for value, told in ticks.items():
        kind = "grid zero" if sign and value == 0 else "grid"
        marks.append(f'<line class="{kind}" x1="{left}" x2="{_WIDTH}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        marks.append(f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{told}</text>')
    for column, place in enumerate(columns):
        middle = left + step * (column + 0.5)
        marks.append(
            f'<text x="{middle:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(str(place.labels))}</text>'
        )
    for number, (method, line) in enumerate(lines.items()):
        points = [(x(c, number), place) for c, place in enumerate(columns) if place in line]
        path = " ".join(f"{at:.1f},{y(line[place].mean):.1f}" for at, place in points)
        own = _look(bench, method)
        drawn = "" if sign else f'<polyline class="line" points="{path}"{_dash(bench, method)}/>'
        for at, place in points:
            one = line[place]
            told = escape(f"{method}, {label(place)}: {told_interval(one, sign)}")
            drawn += f'<line class="line" x1="{at:.1f}" x2="{at:.1f}" y1="{y(one.low):.1f}" y2="{y(one.high):.1f}"/>'
            drawn += f'<g transform="translate({at:.1f} {y(one.mean):.1f})">{_mark(own, told)}</g>'
        marks.append(f'<g class="s{own.colour}">{drawn}</g>')
    legend = "".join(_key(bench, name, with_line=not sign) for name in lines)
    told = escape(f"{title}; {len(lines)} methods; the tables below have the figures")
    return (
        f'<figure class="spread"><figcaption class="legend">{legend}<span>{escape(title)}</span></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{told}">{"".join(marks)}</svg></figure>'
    )


def _dash(bench: Bench, method: str) -> str:
    return "" if bench.methods[method].pretrained else ' stroke-dasharray="5 4"'


def _key(bench: Bench, method: str, with_line: bool) -> str:
    """Return a method's entry in a legend: its mark, on its line where the chart has lines, and its name."""
    own = _look(bench, method)
    line = f'<path class="line" d="M-14 0H14"{_dash(bench, method)}/>' if with_line else ""
    width = 30 if with_line else 14
    drawn = f'<svg viewBox="{-width / 2:g} -7 {width} 14" width="{width}" height="14" aria-hidden="true">'
    return f'<span class="key s{own.colour}">{drawn}{line}{_mark(own)}</svg>{escape(method)}</span> '


def round_values(low: float, high: float) -> list[float]:
    """Return round values from ``low`` to ``high`` for the lines of a chart, three to seven of them.

    Args:
        low: the least value shown.
        high: the greatest, above it.
    """
    width = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(width))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= 0.7 * width)
    return [round(number * step, 12) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _closing(bench: Bench, compared: _Compared) -> str:
    return f'<p class="note">{escape(closing(bench, compared))}</p>' if compared else ""
