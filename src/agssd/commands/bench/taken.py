"""Results that benches elsewhere have written, brought together: for tables without data or training."""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agssd.commands.bench.cells import Cell, list_cells
from agssd.commands.bench.kept import keep
from agssd.commands.bench.records import ROW
from agssd.commands.bench.results import CLASSES, FOLD, LATER, OF_A_RUN, ROWS, RUN, SETTINGS, SUBJECTS, places
from agssd.commands.bench.settings import Bench
from agssd.commands.bench.tables import of_place
from agssd.whole_file import whole_file

_WHOLE = ("steps", "draw", "seed", "pretraining_steps")
_REAL = ("value", "seconds", "pretraining_seconds")
_OPTIONAL = ("fold", *LATER, "pretraining_commit", "commit")
_Run = tuple[str, ...]  # the columns that say which run it is, as they are written


def take_over(bench: Bench, folders: Sequence[Path], out: Path) -> list[Cell]:
    """Put the runs of ``rows.csv`` and ``subjects.csv`` of folders where a bench in ``out`` has its own.

    What is kept says how many of the rows are of the settings in ``bench``; others are taken over all the same.

    Args:
        bench: the settings.
        folders: each with both files, either of them compressed with gzip (``rows.csv.gz``) or not.
        out: a new directory, in which no cell can be run afterwards.

    Returns:
        Every cell of the bench, those that are done with the mark of their row.

    Raises:
        ValueError: for a directory that holds something, and for files that cannot be read, that do not fit together,
            or that hold a run which the bench does not ask for, or one twice with two results. Nothing is written then.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is there already; --results wants a new folder")
    cells = {_run_of(cell, bench): cell for cell in list_cells(bench, "", out)}
    found: dict[_Run, tuple[Path, dict[str, Any]]] = {}
    for folder in folders:
        for run, row in _rows(folder):
            if run not in cells:
                raise ValueError(f"{folder} has a run that --config does not ask for: {_told(run)}")
            first, before = found.setdefault(run, (folder, row))
            if before["subjects"] != row["subjects"]:
                raise ValueError(f"{first} and {folder} have two results of one run, keep one: {_told(run)}")
    rows = [row for _, row in found.values()]
    names = [folder.resolve().name for folder in folders]
    for place in places(bench):
        try:
            of_place(bench, rows, place)
        except ValueError as error:
            raise ValueError(f"the runs in {', '.join(map(str, folders))} do not fit together: {error}") from error
    for run, (_, row) in found.items():
        with whole_file(cells[run].folder / ROW) as path:
            path.write_text(json.dumps(row | {SETTINGS: row.get(SETTINGS)}, indent=1) + "\n", encoding="utf-8")
    marked = [replace(cell, mark=found[run][1]["mark"] if run in found else "") for run, cell in cells.items()]
    origin = [("runs of", ", ".join(names)), ("their settings", _told_settings(cells, found))]
    keep(bench, origin, marked, out, names)
    return marked


def _told_settings(cells: Mapping[_Run, Cell], found: Mapping[_Run, tuple[Path, dict[str, Any]]]) -> str:
    """Return of how many runs the settings are those of the bench, in words."""
    same = [
        None if row.get(SETTINGS) is None else row[SETTINGS] == cells[run].settings for run, (_, row) in found.items()
    ]
    told = {True: "as the YAML has them", False: "other than the YAML has them", None: "not said"}
    parts = [f"{same.count(one)} {words}" for one, words in told.items() if one in same]
    return f"of {len(same)} runs {', '.join(parts)}"


def _told(run: _Run) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(RUN, run, strict=True) if value)


def _run_of(cell: Cell, bench: Bench) -> _Run:
    found = {name: getattr(cell, name, None) for name in RUN} | {"figure": bench.figure}
    return tuple("" if found[name] is None else str(found[name]) for name in RUN)


def _rows(folder: Path) -> Iterator[tuple[_Run, dict[str, Any]]]:
    """Yield the runs of a folder and their rows, as a bench keeps them."""
    subjects: dict[_Run, dict[str, float | None]] = {}
    lines, _ = _lines(folder, SUBJECTS, (*RUN, "subject", "value"))
    for one in lines:
        its = subjects.setdefault(_run(one), {})
        if one["subject"] in its:
            raise ValueError(f"{folder / SUBJECTS} has the subject {one['subject']} twice: {_told(_run(one))}")
        its[one["subject"]] = _number(folder / SUBJECTS, one, "value") if one["value"] else None
    lines, columns = _lines(folder, ROWS, (*RUN, *OF_A_RUN))
    path, seen = folder / ROWS, set()
    for one in lines:
        run = _run(one)
        if run in seen or run not in subjects:
            which = "a run twice" if run in seen else f"a run whose subjects {SUBJECTS} beside it does not have"
            raise ValueError(f"{path} has {which}: {_told(run)}")
        seen.add(run)
        row: dict[str, Any] = dict(one)
        row |= {name: int(_number(path, one, name)) for name in _WHOLE}
        row |= {name: _number(path, one, name) for name in _REAL}
        row |= {name: one[name] or None for name in _OPTIONAL if name in columns}
        for name in {"fold", FOLD} & set(columns):
            row[name] = int(_number(path, one, name)) if one[name] else None
        row[CLASSES] = _classes(path, one)
        row["labels"] = int(one["labels"]) if one["labels"].isdigit() else one["labels"]
        values = [value for value in subjects[run].values() if value is not None]
        if not values or not math.isclose(row["value"], sum(values) / len(values), abs_tol=1e-9):
            raise ValueError(f"{path} has a value that is not the mean of its subjects in {SUBJECTS}: {_told(run)}")
        yield run, row | {"subjects": subjects[run]}
    if missing := [run for run in subjects if run not in seen]:
        raise ValueError(f"{folder / SUBJECTS} has a run that {ROWS} beside it does not have: {_told(missing[0])}")


def _run(one: dict[str, str]) -> _Run:
    return tuple(one[name] for name in RUN)


def _lines(folder: Path, name: str, columns: Sequence[str]) -> tuple[list[dict[str, str]], Sequence[str]]:
    """Return the lines of a CSV file by column, and its columns."""
    plain, packed = folder / name, folder / f"{name}.gz"
    path = plain if plain.is_file() else packed
    if not path.is_file():
        raise ValueError(f"--results: {folder} has no {name}, nor {packed.name}; name one that `agssd bench` wrote")
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path == packed else path.open(encoding="utf-8") as file:
            reader = csv.DictReader(file)
            lines, found = list(reader), list(reader.fieldnames or ())
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if missing := [column for column in columns if column not in found]:
        raise ValueError(f"{path} has no column {missing[0]}; it is not what `agssd bench` wrote")
    for number, one in enumerate(lines, 2):
        if None in one or None in one.values():
            raise ValueError(f"line {number} of {path} has not as many values as its first line")
    return lines, found


def _classes(path: Path, one: dict[str, str]) -> dict[str, float] | None:
    text = one.get(CLASSES)
    try:
        return {str(name): float(value) for name, value in json.loads(text).items()} if text else None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has {text!r} for {CLASSES} in a run of {one['method']}: {error}") from error


def _number(path: Path, one: dict[str, str], name: str) -> float:
    try:
        value = float(one[name])
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (name not in (*_REAL, "value") and value != int(value)):
        raise ValueError(f"{path} has {one[name]!r} for {name} in a run of {one['method']} by {one['readout']}")
    return value
