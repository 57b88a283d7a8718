"""``metrics.csv``: every row on disk at once, kept, rewound and never half a file."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest

from agssd.run.metrics_file import RunCSVLogger


def test_metrics__every_row_is_on_disk_at_once_and_survives_a_resume(tmp_path: Path) -> None:
    def rows() -> list[dict[str, str]]:
        with (tmp_path / "metrics.csv").open() as file:
            return list(csv.DictReader(file))

    first = RunCSVLogger(tmp_path)
    first.log_metrics({"train/loss": 3.0}, step=0)
    first.log_metrics({"train/loss": 2.0}, step=1)
    assert [row["train/loss"] for row in rows()] == ["3.0", "2.0"]  # without finalize: a killed run keeps its rows
    second = RunCSVLogger(tmp_path)
    second.log_metrics({"train/loss": 1.0}, step=2)
    second.log_metrics({"train/loss": 0.5, "val/loss": 4.0}, step=3)
    assert [(row["step"], row["train/loss"], row["val/loss"]) for row in rows()] == [
        ("0", "3.0", ""),
        ("1", "2.0", ""),
        ("2", "1.0", ""),
        ("3", "0.5", "4.0"),
    ]


def table(path: Path) -> list[tuple[int, str]]:
    with path.open(newline="") as file:
        return [(int(row["step"]), row["train/loss"]) for row in csv.DictReader(file)]


def test_metrics__rows_of_an_interrupted_part_are_taken_out_and_a_torn_line_too(tmp_path: Path) -> None:
    first = RunCSVLogger(tmp_path)
    for step in range(5):
        first.log_metrics({"train/loss": float(step)}, step=step)
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text() + "9.0")  # the power failed in the middle of a row
    second = RunCSVLogger(tmp_path)
    second.rewind(3)
    assert table(path) == [(0, "0.0"), (1, "1.0"), (2, "2.0")]
    second.log_metrics({"train/loss": 30.0}, step=3)
    assert table(path) == [(0, "0.0"), (1, "1.0"), (2, "2.0"), (3, "30.0")]
    RunCSVLogger(tmp_path).rewind(9)
    assert len(table(path)) == 4
    RunCSVLogger(tmp_path).rewind(0)  # killed before the first checkpoint
    assert not path.exists()


def test_metrics__a_new_column_never_leaves_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = RunCSVLogger(tmp_path)
    logger.log_metrics({"train/loss": 1.0}, step=0)

    def killed(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        logger.log_metrics({"train/loss": 2.0, "val/loss": 3.0}, step=1)
    assert table(tmp_path / "metrics.csv") == [(0, "1.0")]
