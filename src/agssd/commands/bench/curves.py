"""A bench as a picture: what each method makes of few labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from agssd.commands.bench.looks import COLOURS, look
from agssd.commands.bench.results import figures, heading, places
from agssd.commands.bench.settings import Bench
from agssd.evaluation.statistics import crossed_mean
from agssd.whole_file import whole_file


def draw(bench: Bench, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw one panel per readout and budget: the figure over the labels, with 95 % intervals."""
    panels = list(dict.fromkeys(place[:2] for place in places(bench)))
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    apart = min(0.06, 0.8 / len(bench.methods))  # bars beside one another
    for axis, (readout, steps) in zip(axes, panels, strict=True):
        columns = [place for place in places(bench) if place[:2] == (readout, steps)]
        for number, method in enumerate(bench.methods):
            shift = apart * (number - (len(bench.methods) - 1) / 2)
            points = [
                (x + shift, crossed_mean(table))
                for x, place in enumerate(columns)
                if (table := figures(bench, rows, method, place)) is not None
            ]
            if points:
                xs, means = [x for x, _ in points], [interval.mean for _, interval in points]
                bars = [[i.mean - i.low for _, i in points], [i.high - i.mean for _, i in points]]
                own = look(number)  # the same in every panel, whoever else is in it
                style = "--" if not bench.methods[method].pretrained else "-"
                axis.errorbar(
                    xs,
                    means,
                    bars,
                    label=method,
                    color=COLOURS[own.colour],
                    marker=own.marker,
                    markersize=6.5,
                    linewidth=1.2,
                    markerfacecolor="white" if own.hollow else None,
                    linestyle=style,
                    capsize=2,
                )
        axis.set_xticks(range(len(columns)), [str(place.labels) for place in columns])
        axis.set_xlabel("labelled subjects")
        axis.set_title(heading(readout, steps), fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("Dice" if bench.figure == "dice" else "balanced accuracy")
    named = {name: line for axis in axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    known = [name for name in bench.methods if name in named]
    figure.legend([named[name] for name in known], known, fontsize=8, loc="outside right center")
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
