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


def fitting_steps(reference: Path, steps: int | None, same: Path) -> int:
    """Return how many steps of one pretraining take the time of another of the same seed and fold, both done.

    Args:
        reference: folder of the one whose time it is.
        steps: that it has taken.
        same: folder of the one whose steps are asked.

    Raises:
        ValueError: if one of them has left no figure of its speed.
    """
    assert steps is not None  # the reference hangs on no other
    return max(1, round(steps * seconds_per_step(reference) / seconds_per_step(same)))


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
