"""How many steps of one method take the time of another: for pretraining of equal time beside that of equal steps."""

from __future__ import annotations

import csv
from pathlib import Path

from agssd.commands.bench.settings import Bench

_COLUMN = "throughput/s_per_step"
_INTERVAL = 50  # optimiser steps between figures of the shipped experiments


def clock_flags(bench: Bench, steps: int) -> list[str]:
    """Return the flags by which a pretraining of few steps still says how long they take, if that is asked."""
    if bench.equal_time is None or steps >= 4 * _INTERVAL:
        return []
    return ["--throughput.every_n_steps", str(max(1, steps // 4))]


def steps_of(bench: Bench, method: str, folder: Path) -> int | None:
    """Return the optimiser steps of a pretraining; None where they hang on another that is not done.

    Args:
        bench: the settings.
        method: a name in it, with ``pretrain``.
        folder: of the pretraining, ``.../METHOD/seedS``; those of the same seed and fold lie beside its parent.

    Raises:
        ValueError: if a pretraining that is done has left no figure of its speed.
    """
    its = bench.methods[method]
    if its.time_of is None or bench.equal_time is None:
        return its.steps or bench.pretrain_steps
    reference, same = (folder.parents[1] / name / folder.name for name in (bench.equal_time, its.time_of))
    if not ((reference / "row.json").is_file() and (same / "row.json").is_file()):
        return None
    taken = (bench.methods[bench.equal_time].steps or bench.pretrain_steps) * seconds_per_step(reference)
    return max(1, round(taken / seconds_per_step(same)))


def seconds_per_step(folder: Path) -> float:
    """Return the seconds per optimiser step of a run's fastest interval, the one that other work disturbed least.

    Of nine runs with others beside them on a 2-core x86-64 CPU the medians of one method differed by up to 92 %, the
    fastest intervals by 7 % (2026-11-22).

    Raises:
        ValueError: if the run has left none.
    """
    path = folder / "metrics.csv"
    with path.open(newline="", encoding="utf-8") as file:
        found = [float(row[_COLUMN]) for row in csv.DictReader(file) if row.get(_COLUMN)]
    if not found:
        raise ValueError(f"{path} has no {_COLUMN}, by which equal_time goes; set throughput.every_n_steps lower")
    return min(found)
