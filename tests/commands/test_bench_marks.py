"""``agssd bench``: nothing of other settings is measured, gone on with or shown."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_bench import bench, write_bench

from agssd.cli import main
from agssd.commands.bench import _measure_all, _pretrain_all
from agssd.commands.bench.cells import Cell, Pretraining, list_cells
from agssd.commands.bench.kept import kept
from agssd.commands.bench.marks import cache_mark, command_mark
from agssd.commands.bench.records import Job, once, state_of
from agssd.commands.bench.results import read_rows
from agssd.commands.bench.settings import Method
from agssd.data_modules.cache import VolumeCache

ROOT = Path(__file__).resolve().parents[2]


def test_list_cells__marks_change_with_what_is_compared_and_with_nothing_else() -> None:
    def marks(data: str = "d", cache: str = "c.h5", out: str = "out", **given: Any) -> dict[str, str]:
        cells = list_cells(bench(**given), cache, Path(out), data)
        found = {str(cell.folder.relative_to(out)): cell.mark for cell in cells}
        return found | {
            str(one.folder.relative_to(out)): one.mark for cell in cells if (one := cell.pretraining) is not None
        }

    as_it_was = marks()
    assert len(set(as_it_was.values())) == len(as_it_was)
    assert marks(cache="/elsewhere/c.h5", out="../runs/./out", seeds=3) == as_it_was, "places are no settings"
    assert not set(marks(data="other cases").values()) & set(as_it_was.values())
    methods = bench().methods
    other = marks(methods={**methods, "rival": replace(methods["rival"], pretrain=["--config", "c.yaml"])})
    changed = {name for name, mark in other.items() if mark != as_it_was[name]}
    assert changed == {name for name in as_it_was if "/rival/" in name}, "its pretraining and all that hangs on it"
    readouts = bench().readouts
    other = marks(readouts={**readouts, "full": replace(readouts["full"], fit=["--config", "g.yaml"])})
    changed = {name for name, mark in other.items() if mark != as_it_was[name]}
    assert changed == {name for name in as_it_was if "cells/full/" in name and "/unet/" not in name}


def test_list_cells__settings_say_what_the_yaml_says_for_any_data_and_machine() -> None:
    def found(data: str = "d", **given: Any) -> dict[str, str]:
        return {cell.name: cell.settings for cell in list_cells(bench(**given), "c.h5", Path("out"), data)}

    as_it_was = found(equal_time="ours")
    assert len(set(as_it_was.values())) == len(as_it_was)
    assert found("other cases", equal_time="ours") == as_it_was
    assert found("other cases", equal_time="ours", labels=[2], seeds=2).items() <= as_it_was.items()
    methods = bench().methods
    other = found(equal_time="ours", methods=methods | {"rival": replace(methods["rival"], pretrain=["--config", "c"])})
    changed = {name for name, settings in other.items() if settings != as_it_was[name]}
    assert changed == {name for name in as_it_was if "/rival" in name}, "and its twin of equal time"
    other = found(equal_time="ours", methods=methods | {"ours": replace(methods["ours"], steps=9)})
    changed = {name for name, settings in other.items() if settings != as_it_was[name]}
    assert changed == {name for name in as_it_was if "/ours/" in name or "/rival-equal-time/" in name}, (
        "whose time it is"
    )


def test_once__the_time_of_attempts_that_were_interrupted_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(bench(), "c.h5", "c")
    cell, other = list_cells(job.bench, "c.h5", tmp_path, "these cases")[:2]
    clock = iter([100.0, 130.0, 1000.0, 1007.0, 0.0, 2.0])
    monkeypatch.setattr("agssd.commands.bench.records.time.perf_counter", lambda: next(clock))

    def interrupted() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        once(cell, job, interrupted)
    assert once(cell, job, dict)["seconds"] == 37.0
    assert once(other, job, dict)["seconds"] == 2.0
    assert {path.name for path in cell.folder.iterdir()} == {"row.json", "mark.txt"}


def test_once__two_processes_never_work_on_one_run(tmp_path: Path) -> None:
    job = Job(bench(), "c.h5", "c")
    cell, other = list_cells(job.bench, "c.h5", tmp_path, "these cases")[:2]
    work = []

    def nested() -> dict[str, Any]:
        with pytest.raises(ValueError, match=f"another process works on {cell.folder}"):
            once(cell, job, dict)
        work.append(once(other, job, dict))
        return {"by": "the first"}

    assert once(cell, job, nested)["by"] == "the first" and work
    assert once(cell, job, dict)["by"] == "the first"


def test_once__killed_before_it_had_noted_what_it_begins__goes_on(tmp_path: Path) -> None:
    job = Job(bench(), "c.h5", "c")
    cell, other = list_cells(job.bench, "c.h5", tmp_path, "these cases")[:2]
    cell.folder.mkdir(parents=True)
    (cell.folder / "mark.txt.tmp").write_text("ab")
    (cell.folder / "lock").touch()
    assert state_of(cell) == "missing" and once(cell, job, dict) and state_of(cell) == "done"
    other.folder.mkdir(parents=True)
    (other.folder / "mark.txt").write_text("other settings")
    assert state_of(other) == "other"
    (other.folder / "row.json").touch()
    with pytest.raises(ValueError, match=f"row.json holds no row .*; remove {other.folder} to have it made again"):
        once(other, job, dict)


def test_cache_mark__corrected_labels_change_what_is_measured_and_no_pretraining(
    make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    cache = VolumeCache(make_cache(tmp_path / "c.h5", num_cases=3))
    corrected, early = (copy.copy(cache) for _ in range(2))
    corrected.cases = (*cache.cases[:-1], replace(cache.cases[-1], label_sha256="0" * 64))
    early.cases = tuple(replace(case, label_sha256=None) for case in cache.cases)
    assert len({cache_mark(one) for one in (cache, corrected, early)}) == 3
    assert len({cache_mark(one, with_labels=False) for one in (cache, corrected, early)}) == 1
    settings = bench()
    both = [
        list_cells(settings, "c.h5", tmp_path, cache_mark(one), None, cache_mark(one, with_labels=False))
        for one in (cache, corrected)
    ]
    for cell, other in zip(*both, strict=True):
        assert cell.mark != other.mark
        assert cell.pretraining == other.pretraining


def test_run__nothing_is_measured_with_an_encoder_of_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, asked = bench(), []
    cells = list_cells(settings, "c.h5", tmp_path)
    for cell in cells:
        if cell.pretraining is not None:
            cell.pretraining.folder.mkdir(parents=True, exist_ok=True)
            row = {"mark": "before" if cell.method == "ours" else cell.pretraining.mark}
            (cell.pretraining.folder / "row.json").write_text(json.dumps(row))

    def work(tasks: dict[str, Any], workers: int, preload: Any) -> list[tuple[str, str]]:
        asked.extend(task[1] for task in tasks.values())
        return []

    monkeypatch.setattr("agssd.commands.bench.side_by_side", work)
    job = Job(settings, "c.h5", "c")
    _measure_all(job, _pretrain_all(job, cells, 1, lambda: list_cells(settings, "c.h5", tmp_path))[1], 1)
    assert {one.method for one in asked if isinstance(one, Pretraining)} == {"ours", "rival"}, "one is refused there"
    assert {one.method for one in asked if isinstance(one, Cell)} == {"scratch", "unet", "rival"}


def test_read_rows__a_row_of_other_settings_is_in_no_table(tmp_path: Path) -> None:
    out = tmp_path / "bench"
    write_bench(out, {"ours": 0.1})
    cells = kept(out).cells(out)
    assert len(read_rows(cells)) == len(cells)
    path = cells[7].folder / "row.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mark": "before"}))
    assert state_of(cells[7]) == "other" and state_of(cells[8]) == "done"
    assert len(read_rows(cells)) == len(cells) - 1
    assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0
    assert "1 of 363 runs are not done" in (tmp_path / "page.html").read_text()


def test_once__work_begun_with_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    job = Job(bench(), "c.h5", "c")
    cell = list_cells(job.bench, "c.h5", tmp_path, "these cases")[0]

    def stopped() -> dict[str, Any]:
        (cell.folder / "checkpoint").touch()
        raise RuntimeError("preempted")

    with pytest.raises(RuntimeError, match="preempted"):
        once(cell, job, stopped)
    for mark in ("other", ""):
        with pytest.raises(ValueError, match="made with other settings"):
            once(replace(cell, mark=mark), job, dict)
    assert once(cell, job, dict)["mark"] == cell.mark and state_of(cell) == "done"


def test_command_mark__changes_with_what_the_files_say_that_a_command_leads_to(tmp_path: Path) -> None:
    views, experiment = tmp_path / "views.yaml", tmp_path / "experiments" / "one.yaml"
    experiment.parent.mkdir()
    views.write_text("scale: [0.4, 0.9]\n")
    experiment.write_text("views: ../views.yaml\nrest: [1, later.yaml]\n")
    command = ["fit", "--config", str(experiment), "--seed", "0", "--backbone", "missing.yaml"]
    mark = command_mark(command)
    views.write_text("scale: [0.4, 0.9] # a comment changes nothing\n")
    assert command_mark(command) == mark
    assert command_mark([*command[:-2], "--backbone", "other.yaml"]) != mark
    there = bench(methods={"scratch": Method(), "ours": Method(command)}).fingerprint()
    same = [word.replace(str(tmp_path), f"{tmp_path}/experiments/..") for word in command]
    assert bench(methods={"scratch": Method(), "ours": Method(same)}).fingerprint() == there, "a place is no setting"
    views.write_text("scale: [0.4, 1.0]\n")
    assert command_mark(command) != mark
    assert bench(methods={"scratch": Method(), "ours": Method(command)}).fingerprint() != there
