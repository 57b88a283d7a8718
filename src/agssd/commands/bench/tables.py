"""A bench as Markdown: means with intervals, and paired differences corrected for their number."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from agssd.commands.bench.results import (
    FOLD,
    MACHINE,
    Place,
    class_figures,
    figures,
    heading,
    num_runs,
    places,
    subjects,
    told_leakage,
    told_left_out,
)
from agssd.commands.bench.settings import Bench
from agssd.evaluation.statistics import Interval, crossed_mean, holm, paired_difference

ALPHA = 0.05
DICE = "mean Dice of a subject's classes (absent: 0 where it is predicted, else left out)"
OF_FOLDS = "What the training subjects of a fold have in common is in no interval."
NOTHING_YET = "None of its figures is complete yet."
_Figures = dict[str, npt.NDArray[np.float64]]


def markdown(bench: Bench, rows: Sequence[dict[str, Any]]) -> str:
    """Return a table of means and one of differences for each readout and budget, with what is missing."""
    parts = [head(bench, rows)]
    found = {place: of_place(bench, rows, place) for place in places(bench)}
    compared = compare(bench, found)
    for (readout, steps), group in groupby(found, key=lambda place: place[:2]):
        columns = {place: found[place] for place in group}
        parts.append(f"## {heading(readout, steps)}\n\n{_means(bench, columns)}")
        if here := {key: value for key, value in compared.items() if key[2] in columns}:
            parts.append(_differences(here, list(columns)))
    if compared:
        parts.append(closing(bench, compared))
    return "\n\n".join(parts)


def by_class(bench: Bench, rows: Sequence[dict[str, Any]]) -> str:
    """Return a table of means by class for each place whose runs are all there and say them; else nothing."""
    parts = []
    for place in places(bench):
        found = of_classes(bench, rows, place)
        if not found:
            continue
        names = class_names(found)
        lines = ["| method | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for method, its in found.items():
            cells = [f"{its[name]:.3f}" if name in its else "" for name in names]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        parts.append(f"## {heading(place.readout, place.steps)}, {label(place)}\n\n" + "\n".join(lines))
    return "\n\n".join([told_classes(bench), *parts]) if parts else ""


def of_classes(bench: Bench, rows: Sequence[dict[str, Any]], place: Place) -> dict[str, dict[str, float]]:
    """Return by method and number of the class the mean figure at a place, of methods whose runs are all there."""
    whole = [method for method in bench.methods if figures(bench, rows, method, place) is not None]
    return {method: its for method in whole if (its := class_figures(rows, method, place))}


def class_names(found: dict[str, dict[str, float]]) -> list[str]:
    """Return the classes that some method has a figure of, in their order."""
    return sorted({name for its in found.values() for name in its}, key=int)


def told_classes(bench: Bench) -> str:
    """Return what figures by class are, in a sentence."""
    what = "Dice" if bench.figure == "dice" else "share of a class's volumes that is found"
    return f"{what} by number of the class: means over subjects, seeds and draws, without intervals and tests."


def head(bench: Bench, rows: Sequence[dict[str, Any]]) -> str:
    """Return what was compared, on what, and what the intervals are, in a paragraph."""
    marks = {str(row["bench"]) for row in rows}
    commits = {str(row[name]) for row in rows for name in ("commit", "pretraining_commit") if row[name]}
    pretrained = [name for name, method in bench.methods.items() if method.pretrained]
    what = DICE if bench.figure == "dice" else "balanced accuracy"
    where = "the split test" if bench.num_folds is None else f"{bench.num_folds} folds of the split train"
    return (
        f"{what} on {where}; {_seeds(bench)}, {bench.draws} "
        f"draw{'s' * (bench.draws > 1)} of the labels (all labels: 1), "
        f"{bench.pretrain_steps} steps of pretraining ({', '.join(pretrained) or 'none'}{_other_steps(bench, rows)}); "
        f"{told_leakage(bench, rows)}. "
        f"{_axes(bench)} "
        f"{told_left_out(rows)}{_runs(bench, rows)}; settings "
        f"{', '.join(sorted(marks))}; commit {', '.join(sorted(commits)) or 'not known'}."
    )


def _axes(bench: Bench) -> str:
    """Return what intervals are over, and where and over what they are not, in one or two sentences."""
    axes = {"seeds": bench.seeds, "draws": bench.draws}
    over = ", ".join(name for name, levels in axes.items() if levels > 1)
    alone = " and ".join(name for name, levels in axes.items() if levels == 1)
    gaps = [f"over {alone}, of which there is one"] if alone else []
    if one_seed := [name for name in bench.readouts if bench.seeds_of(name) == 1 < bench.seeds]:
        gaps.append(f"over seeds where there is one ({', '.join(one_seed)})")
    if bench.draws > 1 and any(bench.draws_of(place.labels) == 1 for place in places(bench)):
        gaps.append("over draws where all labels are used")
    told = f"Mean with 95 % interval over {over}{' and ' * bool(over)}subjects"
    told += f", not {' and not '.join(gaps)}." if gaps else "."
    return told if bench.num_folds is None else f"{told} {OF_FOLDS}"


def _runs(bench: Bench, rows: Sequence[dict[str, Any]]) -> str:
    """Return how many runs there are, and of how many."""
    whole = num_runs(bench)
    return f"{len(rows)} runs" if len(rows) == whole else f"{len(rows)} of {whole} runs: the bench is not finished"


def _seeds(bench: Bench) -> str:
    """Return how many pretraining seeds there are, and of which readouts fewer."""
    fewer = [f"{name} {bench.seeds_of(name)}" for name in bench.readouts if bench.seeds_of(name) < bench.seeds]
    told = f" ({', '.join(fewer)})" if fewer else ""
    return f"{bench.seeds} seed{'s' * (bench.seeds > 1)}{told}"


def _other_steps(bench: Bench, rows: Sequence[dict[str, Any]]) -> str:
    """Return which methods were pretrained for other numbers of steps, and why."""
    told = [f"{name} elsewhere" for name, method in bench.methods.items() if method.encoders]
    for name, method in bench.methods.items():
        steps = sorted({row["pretraining_steps"] for row in rows if row["method"] == name and method.pretrain})
        if steps and steps != [bench.pretrain_steps]:
            why = "" if method.time_of is None else f", the time of {bench.equal_time}"
            why += " on another kind of machine" * _timed_on_another(rows, method.time_of, bench.equal_time)
            told.append(f"{name} {' to '.join(map(str, dict.fromkeys((steps[0], steps[-1]))))}{why}")
    return f"; {'; '.join(told)}" if told else ""


def _timed_on_another(rows: Sequence[dict[str, Any]], *methods: str | None) -> bool:
    """Return whether methods whose speeds were compared ran on different kinds of machine for one seed and fold."""
    found: dict[tuple[int, int | None], set[str]] = {}
    for row in rows:
        if row["method"] in methods and row.get(MACHINE):
            found.setdefault((row["seed"], row.get(FOLD, row["fold"])), set()).add(row[MACHINE])
    return any(len(machines) > 1 for machines in found.values())


def of_place(bench: Bench, rows: Sequence[dict[str, Any]], place: Place) -> _Figures:
    """Return the figures (seeds, draws, subjects) of every method whose runs at a place are all there.

    Raises:
        ValueError: if two runs have measured other subjects, of one method or of two.
    """
    found = {method: figures(bench, rows, method, place) for method in bench.methods}
    whole = {method: table for method, table in found.items() if table is not None}
    measured = {method: subjects(rows, method, place) for method in whole}
    for first, method in pairwise(measured):
        if measured[method] != measured[first]:
            raise ValueError(
                f"{method} and {first} have measured other subjects by {place.readout}; a cache has changed: give "
                "another --out"
            )
    return whole


def _means(bench: Bench, found: dict[Place, _Figures]) -> str:
    if not any(found.values()):
        return NOTHING_YET
    lines = ["| method | " + " | ".join(label(place) for place in found) + " |", "|---" * (len(found) + 1) + "|"]
    for method in bench.methods:
        if any(method in tables for tables in found.values()):
            cells = [
                told_interval(crossed_mean(tables[method])) if method in tables else "" for tables in found.values()
            ]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare(bench: Bench, found: dict[Place, _Figures]) -> dict[tuple[str, str, Place], tuple[Interval, float]]:
    """Return the paired differences at places with p-values corrected over all of them.

    Every method against ``scratch``, and the leader against every other.
    """
    intervals = {
        (first, second, place): paired_difference(tables[first], tables[second])
        for first, second in _pairs(bench)
        for place, tables in found.items()
        if first in tables and second in tables
    }
    names = {str(key): key for key in intervals}
    corrected = holm({name: intervals[key].p for name, key in names.items()})
    return {key: (intervals[key], corrected[name]) for name, key in names.items()}


def _pairs(bench: Bench) -> list[tuple[str, str]]:
    pairs = [(name, "scratch") for name in bench.methods if name != "scratch"]
    leader = bench.leader
    return pairs + [(leader, name) for name in bench.methods if leader is not None and name not in ("scratch", leader)]


def closing(bench: Bench, compared: Collection[Any]) -> str:
    """Return what differences, intervals and p are, in a paragraph."""
    return (
        "Differences are paired by seed, draw and subject; intervals are of single ones, p after Holm over "
        f'{_counted(bench, compared)}. "No difference shown" is such a p of {ALPHA} or more, '
        "even where the single interval excludes 0: no proof of none."
    )


def _counted(bench: Bench, compared: Collection[Any]) -> str:
    """Return over how many differences p is corrected, and of how many that there will be."""
    whole = sum(
        bench.takes_part(first, place.readout) and bench.takes_part(second, place.readout)
        for place in places(bench)
        for first, second in _pairs(bench)
    )
    if len(compared) == whole:
        return f"all {whole} of this bench"
    return f"the {len(compared)} of {whole} differences of this bench whose runs are all there"


def _differences(compared: dict[tuple[str, str, Place], tuple[Interval, float]], columns: Sequence[Place]) -> str:
    lines = ["| difference | " + " | ".join(map(label, columns)) + " |", "|---" * (len(columns) + 1) + "|"]
    for first, second in dict.fromkeys(key[:2] for key in compared):
        cells = []
        for place in columns:
            interval, p = compared.get((first, second, place), (None, 1.0))
            told = f"p {probability(p)}{'' if p < ALPHA else ', no difference shown'}"
            cells.append("" if interval is None else f"{told_interval(interval, '+')}, {told}")
        lines.append(f"| {first} - {second} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def probability(p: float) -> str:
    """Return a p-value with its sign, ``= 0.017``; where three digits would not show it below a bound, ``< 0.050``."""
    if p < 0.001:
        return "< 0.001"
    return f"< {ALPHA:.3f}" if p < ALPHA <= round(p, 3) else f"= {p:.3f}"


def label(place: Place) -> str:
    """Return the heading of a column."""
    return f"{place.labels} subjects" if isinstance(place.labels, int) else f"{place.labels} of the labels"


def told_interval(interval: Interval, sign: str = "") -> str:
    """Return a mean with its interval; ``sign`` "+" for a difference."""
    return f"{interval.mean:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"
