"""Results that benches elsewhere have written, taken over as runs that are done: for tables without the data."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agssd.commands.bench.cells import Cell, list_cells
from agssd.commands.bench.kept import keep
from agssd.commands.bench.records import ROW, kept_row
from agssd.commands.bench.results import ROWS, RUN, SUBJECTS
from agssd.commands.bench.settings import Bench
from agssd.whole_file import whole_file

_WHOLE = ("steps", "draw", "seed", "pretraining_steps")
_REAL = ("value", "seconds", "pretraining_seconds")
_Run = tuple[str, ...]  # the columns that say which run it is, as they are written


def take_over(bench: Bench, folders: Sequence[Path], out: Path) -> list[Cell]:
    """Put the runs of ``rows.csv`` and ``subjects.csv`` of folders where a bench in ``out`` has its own.

    Nothing says that the settings behind the rows are those of ``bench``: their marks are kept, so that a bench which
    goes on in ``out`` with a cache takes those of its own settings alone.

    Args:
        bench: the settings.
        folders: each with both files, either of them compressed with gzip (``rows.csv.gz``) or not.
        out: directory of the bench.

    Returns:
        Every cell of the bench, those that are done with the mark of their row.

    Raises:
        ValueError: for files that cannot be read, that do not fit together, or that hold a run which the bench does not
            ask for, or another result of a run than the rest or ``out``. Nothing is written then.
    """
    cells = {_run_of(cell, bench): cell for cell in list_cells(bench, "", out)}
    found: dict[_Run, dict[str, Any]] = {}
    for folder in folders:
        for run, row in _rows(folder):
            told = ", ".join(f"{name} {value}" for name, value in zip(RUN, run, strict=True) if value)
            if run not in cells:
                raise ValueError(f"{folder} has a run that --config does not ask for: {told}")
            before = found.get(run) or kept_row(cells[run])
            if before is not None and any(before[name] != row[name] for name in ("subjects", "mark")):
                raise ValueError(f"{folder} and what was there before have two results of one run: {told}; keep one")
            found[run] = row
    for run, row in found.items():
        with whole_file(cells[run].folder / ROW) as path:
            path.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    marked = [replace(cell, mark=(kept_row(cell) or {}).get("mark", "")) for cell in cells.values()]
    keep(bench, [("runs taken over from", ", ".join(folder.name for folder in folders))], marked, out)
    return marked


def _run_of(cell: Cell, bench: Bench) -> _Run:
    found = {name: getattr(cell, name, None) for name in RUN} | {"figure": bench.figure}
    return tuple("" if found[name] is None else str(found[name]) for name in RUN)


def _rows(folder: Path) -> Iterator[tuple[_Run, dict[str, Any]]]:
    subjects: dict[_Run, dict[str, float]] = {}
    for path, one in _lines(folder, SUBJECTS, (*RUN, "subject", "value")):
        its = subjects.setdefault(_run(one), {})
        if one["subject"] in its:
            raise ValueError(f"{path} has the subject {one['subject']} twice in one run: {', '.join(_run(one))}")
        its[one["subject"]] = _number(path, one, "value")
    for path, one in _lines(folder, ROWS, (*RUN, *_WHOLE, *_REAL, "mark")):
        run = _run(one)
        if run not in subjects:
            raise ValueError(f"{path} has a run whose subjects {SUBJECTS} beside it does not have: {', '.join(run)}")
        row: dict[str, Any] = {name: value or None for name, value in one.items()}
        row |= {name: int(_number(path, one, name)) for name in _WHOLE}
        row |= {name: _number(path, one, name) for name in _REAL}
        row["fold"] = int(_number(path, one, "fold")) if one["fold"] else None
        row["labels"] = int(one["labels"]) if one["labels"].isdigit() else one["labels"]
        yield run, row | {"subjects": subjects.pop(run)}
    if subjects:
        raise ValueError(
            f"{folder / SUBJECTS} has a run that {ROWS} beside it does not have: {', '.join([*subjects][0])}"
        )


def _run(one: dict[str, str]) -> _Run:
    return tuple(one[name] for name in RUN)


def _lines(folder: Path, name: str, columns: Iterable[str]) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield the lines of a CSV file by column, each with the file's path."""
    plain, packed = folder / name, folder / f"{name}.gz"
    path = plain if plain.is_file() else packed
    if not path.is_file():
        raise ValueError(
            f"--results: {folder} has no {name}, nor {packed.name}; name a folder that `agssd bench` wrote"
        )
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path == packed else path.open(encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    for one in lines:
        if missing := [column for column in columns if one.get(column) is None]:
            raise ValueError(f"{path} has a line without {missing[0]}; it is not what `agssd bench` wrote")
        yield path, one


def _number(path: Path, one: dict[str, str], name: str) -> float:
    try:
        return float(one[name])
    except ValueError:
        raise ValueError(f"{path} has {one[name]!r} where {name} is a number") from None
