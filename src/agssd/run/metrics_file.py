"""The ``metrics.csv`` of a run, which a run that goes on appends to and rewinds."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info

from agssd.run.state import METRICS
from agssd.whole_file import whole_file


class _AppendingWriter(_ExperimentWriter):
    """Keeps the rows of an earlier part of the run, where Lightning's writer would delete the file."""

    def __init__(self, log_dir: str, name: str) -> None:
        self.NAME_METRICS_FILE = name
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = sorted(next(csv.reader(file), []))

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        _write_rows(path, fieldnames, _whole_rows(path))

    def _check_log_dir_exists(self) -> None:
        """Accept a directory that holds the run."""


def _whole_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table, without a last line that was cut off."""
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        del lines[-1]
    return list(csv.DictReader(lines))


def _write_rows(path: Path, fields: Sequence[str], rows: list[dict[str, str]]) -> None:
    with whole_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=fields)
        writer.writeheader()
        writer.writerows(rows)


class RunCSVLogger(CSVLogger):
    """Writes every logged row to ``DIR/metrics.csv`` at once and appends to it after a resume.

    Args:
        directory: the run directory.
        filename: name of the file in it.
    """

    def __init__(self, directory: Path, filename: str = METRICS) -> None:
        """Keep the names; nothing is written before the first row."""
        super().__init__(save_dir=str(directory), name="", version="", flush_logs_every_n_steps=1)
        self._filename = filename

    @property
    @rank_zero_experiment
    def experiment(self) -> _AppendingWriter:
        """Return the writer, on rank zero."""
        if self._experiment is None:
            self._experiment = cast(Any, _AppendingWriter(self.log_dir, self._filename))
        return cast(_AppendingWriter, self._experiment)

    def log_hyperparams(self, params: Any = None) -> None:
        """Do nothing: ``config.yaml`` states what ran."""

    def rewind(self, step: int) -> None:
        """Drop the rows of optimiser steps after the first ``step``: they are about to be taken, and written, again.

        Called before the first row is logged; says how many there were.
        """
        path = Path(self.log_dir) / self._filename
        if not path.is_file():
            return
        rows = _whole_rows(path)
        kept = [row for row in rows if (row.get("step") or "").isdigit() and int(row["step"]) < step]
        if not kept:
            path.unlink()
        else:
            _write_rows(path, list(kept[0]), kept)
        if len(kept) < len(rows):
            rank_zero_info(
                f"{path}: {len(rows) - len(kept)} row(s) after step {step}, where the run goes on, are taken out; they "
                "are written again"
            )
