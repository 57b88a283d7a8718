"""The curves of ``metrics.csv`` as charts: which belong together, what they are called, and their limits."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from agssd.commands.report.run_files import Curve, Run

MAX_POINTS = 2000  # of a series on the page

# (pattern of names, title, part of the name that tells the series), first match wins
_TOGETHER = (
    (r"collapse/(cls|patch)_(.+)", "collapse/{1}", "{0}"),
    (r"collapse/grad_norm_(?!ratio)(.+)", "collapse/grad_norm", "{0}"),
    (r"collapse/overlap_(\d+_\d+|above_\d+)", "collapse/overlap_share", "{0}"),
    (r"collapse/mask_ratio(?:_(nominal))?", "collapse/mask_ratio", "{0}"),
    (r"collapse/cosine_(corresponding|random)", "collapse/token_cosine", "{0}"),
    (r"collapse/rec_psnr_(\w+)", "collapse/rec_psnr", "{0}"),
    (r"collapse/rec_l1(?:_(of_mean))?", "collapse/rec_l1", "{0}"),
    (r"collapse/eased_(\w+)", "collapse/eased", "{0}"),
    (r"train/mask_ratio_(high|low)", "train/mask_ratio", "{0}"),
    (r"data/source(\d+)_(\w+)", "data/{1}", "source {0}"),
    (r"(.+?)_(?:class)?(\d+)", "{0}", "class {1}"),
)
_GROUPS = (
    ("Losses", r"(train|val)/.*loss.*"),
    ("Probes of the frozen encoder", r"probe/(?!step$|seconds$|time_share$|held_out).*"),
    ("Validation", r"val/.*"),
    ("Speed and waiting", r"throughput/.*|probe/(seconds|time_share)"),
    ("Collapse dashboard", r"collapse/.*"),
    ("Schedules", r"schedule/.*|train/.*|lr.*"),
    ("Data", r"data/.*|probe/held_out.*"),
)
OTHER = "Other"
_SKIPPED = {"probe/step"}


@dataclass(frozen=True)
class Limit:
    """A line in a chart: a value that a figure must stay above (``side`` 1) or below (-1); 0 marks a level only."""

    value: float
    label: str
    side: int
    hard: bool = False


@dataclass
class Chart:
    """One chart of one or several curves."""

    title: str
    series: list[tuple[str, Curve]] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)


def group_charts(run: Run, limits: Mapping[str, Sequence[Limit]]) -> dict[str, list[Chart]]:
    """Return the charts of every curve of a run by the name of their group, each curve in exactly one chart.

    Args:
        run: its curves.
        limits: by the title of a chart.
    """
    charts: dict[str, Chart] = {}
    for name in _ordered(run.curves):
        title, series = _place(name, run.curves)
        chart = charts.setdefault(title, Chart(title, limits=list(limits.get(title, ()))))
        chart.series.append((series, run.curves[name]))
    groups: dict[str, list[Chart]] = {group: [] for group in (*(group for group, _ in _GROUPS), OTHER)}
    for title, chart in charts.items():
        group = next((group for group, pattern in _GROUPS if re.fullmatch(pattern, title)), OTHER)
        groups[group].append(chart)
    groups["Speed and waiting"].sort(key=lambda chart: chart.title.startswith("probe/"))
    return {group: found for group, found in groups.items() if found}


def _ordered(curves: Iterable[str]) -> list[str]:
    """Return the names, a total before its parts, and parts in the order of their numbers."""
    names = [name for name in curves if name not in _SKIPPED]

    def rank(name: str) -> tuple[Any, ...]:
        return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))

    return sorted(names, key=rank)


def _place(name: str, curves: Mapping[str, Curve]) -> tuple[str, str]:
    """Return the title of the chart that a curve belongs to, and its name in there."""
    stage, _, loss = name.partition("/")
    if loss.startswith("loss") and {f"train/{loss}", f"val/{loss}"} <= curves.keys():
        return f"train/{loss}", stage
    for pattern, title, series in _TOGETHER:
        match = re.fullmatch(pattern, name)
        if match:
            parts = [part or "" for part in match.groups()]
            return title.format(*parts), series.format(*parts).replace("_", " ")
    if any(re.fullmatch(rf"{re.escape(name)}_(?:class)?\d+", other) for other in curves):
        return name, "mean"
    return name, ""


def thinned(curve: Curve) -> tuple[list[int], list[float | None]]:
    """Return at most ``MAX_POINTS`` points: the lowest and highest of each stretch, so that no peak is lost.

    Values are rounded to 5 digits; None stands where a value was not finite.
    """
    count = len(curve.steps)
    if count <= MAX_POINTS:
        chosen = list(range(count))
    else:
        chosen = [0]
        stretches = MAX_POINTS // 2 - 1
        for stretch in range(stretches):
            part = range(1 + (count - 2) * stretch // stretches, 1 + (count - 2) * (stretch + 1) // stretches)
            finite = [index for index in part if not math.isnan(curve.values[index])] or list(part)[:1]
            chosen += sorted({min(finite, key=curve.values.__getitem__), max(finite, key=curve.values.__getitem__)})
        chosen.append(count - 1)
    values = [None if math.isnan(curve.values[i]) else float(f"{curve.values[i]:.5g}") for i in chosen]
    return [curve.steps[i] for i in chosen], values


def chart_data(charts: Sequence[Chart], marks: Sequence[Mapping[str, Any]]) -> str:
    """Return the element that holds what the page's script draws; ``charts`` in the order of their numbers."""
    found = []
    for chart in charts:
        series = []
        for name, curve in chart.series:
            steps, values = thinned(curve)
            series.append({"name": name, "x": steps, "y": values})
        limits = [{"value": limit.value, "label": limit.label} for limit in chart.limits]
        found.append({"series": series, "limits": limits})
    every = [step for chart in charts for _, curve in chart.series for step in (curve.steps[0], max(curve.steps))]
    span = [min(every, default=0), max(max(every, default=1), min(every, default=0) + 1)]
    return data_block("chart-data", {"span": span, "charts": found, "marks": list(marks)})


def data_block(name: str, content: Any) -> str:
    """Return a block of data that the page's script reads by its id; nothing in it can end the block."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def chart_html(chart: Chart, number: int) -> str:
    """Return the place of chart ``number``, which the script draws into; in words it is told without one too."""
    told = "; ".join(_in_words(name, curve) for name, curve in chart.series)
    limits = "".join(f"; {limit.label}" for limit in chart.limits)
    words = escape(f"{chart.title}: {told}{limits}", quote=True)
    return (
        f'<figure class="chart" data-chart="{number}"><figcaption><b>{escape(chart.title)}</b>'
        f'<span class="readout"></span></figcaption>'
        f'<div class="plot" tabindex="0" role="img" aria-label="{words}"></div></figure>\n'
    )


def _in_words(name: str, curve: Curve) -> str:
    finite = [value for value in curve.values if not math.isnan(value)]
    lead = f"{name} " if name else ""
    broken = len(curve.values) - len(finite)
    more = f", {broken} not finite" if broken else ""
    if not finite:
        return f"{lead}never finite"
    return (
        f"{lead}{finite[0]:.4g} at step {curve.steps[0]}, {finite[-1]:.4g} at step {curve.steps[-1]}, "
        f"lowest {min(finite):.4g}, highest {max(finite):.4g}{more}"
    )
