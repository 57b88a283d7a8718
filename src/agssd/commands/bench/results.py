"""What a bench has found: rows, and tables of figures by seed, draw and subject."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from agssd.commands.bench.cells import Cell
from agssd.commands.bench.records import kept_row
from agssd.commands.bench.settings import Bench, Labels
from agssd.whole_file import whole_file

ROWS, SUBJECTS = "rows.csv", "subjects.csv"
RUN = ("readout", "steps", "labels", "draw", "seed", "fold", "method", "figure")  # which run it is
FOLD = "pretraining_fold"
LEAKAGE = "leakage"  # what the encoder has seen of whom is measured
CLASSES = "classes"  # figures by class, in JSON
SETTINGS = "settings"  # mark of what the YAML said of the run
MACHINE = "pretraining_machine"
LATER = (FOLD, LEAKAGE, SETTINGS, CLASSES, MACHINE)  # not in older files
NO_LEAK = "none"  # all could be compared, and nothing was seen
_BEFORE = ("pretraining_steps", "pretraining_seconds", "pretraining_commit")
OF_A_RUN = ("value", "seconds", *_BEFORE, "bench", "commit", "time", "machine", "mark")


class Place(NamedTuple):
    """One column of a table: a readout with its budget, and an amount of labels."""

    readout: str
    steps: int
    labels: Labels


def heading(readout: str, steps: int) -> str:
    """Return what to call a readout with its budget; a probe has none."""
    return f"{readout}, {steps} steps" if steps else readout


def read_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return the rows of the cells that are done; a row of other settings than the cell's is left out."""
    rows = []
    for cell in cells:
        row = kept_row(cell)
        if row is not None and row.get("mark") == cell.mark:
            rows.append({SETTINGS: cell.settings} | row)  # an older row, of the same mark and hence of these
    return rows


def write_rows(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Write ``rows.csv``, one row per run, and ``subjects.csv``, one per run and subject."""
    columns = (*RUN, *OF_A_RUN, *LATER)
    with whole_file(out / ROWS) as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        plain = [row | {CLASSES: json.dumps(row[CLASSES])} if row.get(CLASSES) else row for row in rows]
        writer.writerows([row.get(name) for name in columns] for row in plain)
    with whole_file(out / SUBJECTS) as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow((*RUN, "subject", "value"))
        for row in rows:
            lead = [row[name] for name in RUN]
            writer.writerows([*lead, subject, value] for subject, value in row["subjects"].items())


def places(bench: Bench) -> list[Place]:
    """Return every readout, budget and amount of labels in the order of the settings."""
    return [
        Place(name, steps, labels)
        for name, one in bench.readouts.items()
        for steps in one.budgets
        for labels in bench.labels_of(name)
    ]


def num_runs(bench: Bench) -> int:
    """Return how many runs the whole bench has."""
    each = {
        name: bench.seeds_of(name) * (bench.num_folds or 1) * sum(bench.takes_part(one, name) for one in bench.methods)
        for name in bench.readouts
    }
    return sum(each[place.readout] * bench.draws_of(place.labels) for place in places(bench))


def subjects(rows: Sequence[dict[str, Any]], method: str, place: Place) -> set[str]:
    """Return whom the runs of a method at a place have measured."""
    return {subject for row in _runs(rows, method, place) for subject in row["subjects"]}


def told_leakage(bench: Bench, rows: Sequence[dict[str, Any]]) -> str:
    """Return in words what the checks of the runs with a pretraining have found."""
    said = [row.get(LEAKAGE) for row in rows if bench.methods[row["method"]].pretrained]
    parts = [f"not said by {said.count(None)} of {len(said)} runs"] if None in said else []
    parts += [f"{said.count(one)} runs: {one}" for one in sorted({one for one in said if one not in (None, NO_LEAK)})]
    return f"pretraining with measured subjects: {'; '.join(parts) or 'none, as checked for each run'}"


def left_out(rows: Sequence[dict[str, Any]]) -> set[str]:
    """Return the subjects that have no figure in some run: their labels hold no class, and that run predicts none.

    Where another run predicts one it has counted 0, so tables are without them in every run.
    """
    some = [row["subjects"] for row in rows if None in row["subjects"].values()]
    return {subject for one in some for subject, value in one.items() if value is None}


def told_left_out(rows: Sequence[dict[str, Any]]) -> str:
    """Return how many subjects are left out, in a sentence with a space behind it; nothing where none is."""
    gone, known = left_out(rows), {subject for row in rows for subject in row["subjects"]}
    return f"{len(gone)} of {len(known)} subjects are left out, since their labels hold no class. " if gone else ""


def figures(bench: Bench, rows: Sequence[dict[str, Any]], method: str, place: Place) -> npt.NDArray[np.float64] | None:
    """Return (seeds, draws, subjects) of a method at a place; None while one of its runs is missing, or nobody is left.

    Subjects of all folds stand side by side, in one order for every method; without those of ``left_out``.

    Raises:
        ValueError: if two runs have measured other subjects.
    """
    found: dict[tuple[int, int], dict[str, float | None]] = {}
    counts: dict[tuple[int, int], int] = {}
    for row in _runs(rows, method, place):
        key = row["seed"], row["draw"]
        found.setdefault(key, {}).update(row["subjects"])
        counts[key] = counts.get(key, 0) + 1
    seeds, draws = range(bench.seeds_of(place.readout)), range(bench.draws_of(place.labels))
    wanted = {(seed, draw) for seed in seeds for draw in draws}
    if set(found) != wanted or set(counts.values()) != {bench.num_folds or 1}:
        return None
    measured = sorted(found[0, 0])
    if any(sorted(one) != measured for one in found.values()):
        raise ValueError(f"runs of {method} have measured other subjects; a cache has changed: give another --out")
    names = sorted(set(measured) - left_out(rows))
    return np.array([[[found[s, d][n] for n in names] for d in draws] for s in seeds]) if names else None


def class_figures(rows: Sequence[dict[str, Any]], method: str, place: Place) -> dict[str, float]:
    """Return the means over the runs of a method at a place of what each has by class; of classes that any has."""
    found: dict[str, list[float]] = {}
    for row in _runs(rows, method, place):
        for name, value in (row.get(CLASSES) or {}).items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _runs(rows: Sequence[dict[str, Any]], method: str, place: Place) -> list[dict[str, Any]]:
    return [row for row in rows if row["method"] == method and (row["readout"], row["steps"], row["labels"]) == place]
