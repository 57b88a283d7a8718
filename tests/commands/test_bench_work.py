"""``agssd bench``: its work in processes, its readouts without training, and whole benches."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from made_bench import bench, write_small_bench

from agssd.cli import main
from agssd.commands.bench.cells import list_cells, pretrain, train_and_measure
from agssd.commands.bench.equal_time import seconds_per_step
from agssd.commands.bench.probes import probe
from agssd.commands.bench.processes import device_of, side_by_side
from agssd.commands.bench.records import Job, state_of
from agssd.commands.bench.settings import (
    Bench,
    Method,
    Probe,
    Readout,
)
from agssd.data_modules.cache import VolumeCache
from agssd.data_modules.probe_set import ProbeSet
from agssd.evaluation.probe import READOUTS, run_readouts
from agssd.evaluation.probe_features import Depths, encode
from agssd.models.backbone import build_fresh

ROOT = Path(__file__).resolve().parents[2]


def test_probe__names_are_those_of_agssd_probe() -> None:
    assert set(get_args(Probe)) == set(READOUTS)


def test_side_by_side__deals_out_the_gpus_that_it_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, 5")
    wait_and_tell = "__import__('time').sleep(2) or {}[__import__('os').environ['CUDA_VISIBLE_DEVICES']]"
    failed = side_by_side({str(number): (eval, wait_and_tell) for number in range(4)}, 4)  # fails by what it sees
    assert sorted(reason for _, reason in failed) == ["'5'", "'5'", "'GPU-a'", "'GPU-a'"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_of(0) is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [device_of(slot) for slot in range(4)] == ["0", "1", "2", "0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("figure", "kinds", "num_folds", "depths"),
    [
        ("dice", ("knn-seg", "linear-seg"), None, "last"),
        ("dice", ("linear-seg",), None, "all"),
        ("accuracy", ("knn-cls", "linear-cls"), 2, "last"),
    ],
)
def test_probe__same_figures_as_the_readouts_alone_and_once_only(
    figure: str, kinds: tuple[str, ...], num_folds: int | None, depths: Depths, tiny_cache: Path, tmp_path: Path
) -> None:
    backbone = tmp_path / "encoder.yaml"
    vit = {"in_channels": 1, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    backbone.write_text(yaml.safe_dump({"class_path": "agssd.models.vit.ViT", "init_args": vit}))
    readouts = {name: Readout(probe=name, window_vox=[16, 16, 16], depths=depths) for name in kinds}  # type: ignore[arg-type]
    given = {"readouts": readouts, "figure": figure, "backbone": str(backbone), "num_folds": num_folds}
    settings = bench(methods={"scratch": Method()}, labels=[2, "100%"], draws=2, **given)
    cells = [c for c in list_cells(settings, str(tiny_cache), tmp_path) if c.seed == 1 and c.fold in (None, 1)]
    assert len(cells) == len(kinds) * (2 + 1) and not any(cell.fit for cell in cells)
    job = Job(settings, str(tiny_cache), "c0ffee")
    probe(cells, job)
    rows = [json.loads((cell.folder / "row.json").read_text()) for cell in cells]
    kind = "label" if figure == "dice" else "class"
    data = ProbeSet(VolumeCache(tiny_cache), num_folds, kinds=(kind,), measured_on="test")
    encoder = build_fresh(yaml.safe_load(backbone.read_text()), 1)
    features = encode(encoder, data.volumes(), (16, 16, 16), 0.5, depths=depths)
    for row in rows:
        few = None if row["labels"] == "100%" else row["labels"]
        drawn = ProbeSet(data.cache, num_folds, few, subset_seed=row["draw"], kinds=(kind,), measured_on="test")
        fold = drawn.folds[0 if num_folds is None else 1]
        data.folds = (fold,)
        assert set(row["subjects"]) == set(fold.held_out)
        assert row["value"] == pytest.approx(np.mean(list(row["subjects"].values())))
        name = row["readout"].replace("-", "_") + ("_dice" if figure == "dice" else "_balanced_accuracy")
        expected = run_readouts(features, data, [row["readout"]]).figures[name]
        assert row["value"] == pytest.approx(expected, abs=1e-6)
    stamps = {cell: (cell.folder / "row.json").stat().st_mtime_ns for cell in cells}
    probe(cells, job)
    assert all((cell.folder / "row.json").stat().st_mtime_ns == stamp for cell, stamp in stamps.items())
    backbone.write_text(yaml.safe_dump({"class_path": "agssd.models.vit.ViT", "init_args": vit | {"depth": 2}}))
    cells = [c for c in list_cells(settings, str(tiny_cache), tmp_path) if c.folder in {cell.folder for cell in cells}]
    with pytest.raises(ValueError, match="made with other settings"):
        probe(cells, job)


def test_side_by_side__one_that_fails_or_dies_leaves_the_others_be(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"seconds": 3.0, "subjects": "s" * 200_000}  # more than a pipe holds
    tasks: dict[str, Any] = {"dies": (os._exit, 3), "fails": (int, "x")}
    tasks |= {f"works {number}": (dict, row) for number in range(3)}
    failed = dict(side_by_side(tasks, 2))
    assert set(failed) == {"dies", "fails"}
    assert "exit code 3" in failed["dies"] and "invalid literal" in failed["fails"]
    said = capsys.readouterr().out
    assert all(f"works {number}: 3 s" in said for number in range(3)) and "[5/5," in said


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_side_by_side__ended__its_tasks_end_too_and_none_begins(how: signal.Signals, tmp_path: Path) -> None:
    cell = (
        "import os, pathlib, signal, time; path = pathlib.Path({!r}); "
        "signal.signal(signal.SIGTERM, lambda *_, path=path:"
        " (path.with_suffix('.told').touch(), os._exit(0))); path.write_text(str(os.getpid())); time.sleep(300)"
    )
    told = [tmp_path / "first", tmp_path / "second"]
    tasks = {path.name: f"(exec, {cell.format(str(path))!r})" for path in told}
    given = "{" + ", ".join(f"{name!r}: {task}" for name, task in tasks.items()) + "}"
    source = f"from agssd.commands.bench.processes import side_by_side; side_by_side({given}, 1)"
    command = [sys.executable, "-c", f"if __name__ == '__main__':\n    {source}"]
    bench = subprocess.Popen(command, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (told[0].exists() and told[0].read_text()):
            assert bench.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        if how == signal.SIGINT:
            os.killpg(bench.pid, how)  # as a terminal does: the tasks get it too
        else:
            bench.send_signal(how)
        bench.wait(timeout=60)
    finally:
        bench.kill()
        bench.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{told[0].read_text()}").exists():
        assert time.monotonic() < deadline, "the task goes on without its bench"
        time.sleep(0.1)
    assert not told[1].exists()
    assert told[0].with_suffix(".told").exists(), "told by the signal upon which a training saves itself"


def test_bench__runs_goes_on_and_refuses_another_setting(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    small = ["--data.num_workers", "0", "--data.global_batch_size", "2", "--trainer.precision", "32-true"]
    experiment = ROOT / "conf" / "experiment"
    settings = {
        "methods": {
            "scratch": {},
            "simmim": {
                "pretrain": ["--config", str(experiment / "small.yaml"), "--model"]
                + [str(ROOT / "conf" / "method" / "simmim.yaml"), *small]
            },
        },
        "readouts": {"full": {"fit": ["--config", str(experiment / "segmentation_small.yaml"), *small], "steps": [2]}},
        "labels": [1],
        "pretrain_steps": 2,
        "seeds": 1,
        "draws": 1,
        "num_folds": 2,
    }
    path, out = tmp_path / "bench.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(settings))
    command = ["bench", "--config", str(path), "--cache", str(tiny_cache), "--out", str(out)]
    assert main([*command, "--workers", "2"]) == 0, capfd.readouterr().err
    made = {row: row.stat().st_mtime_ns for row in out.rglob("row.json")}
    assert len(made) == 2 + 4 and not list(out.rglob("cells/**/*.ckpt"))
    kept = json.loads(next(row for row in made if "cells" in str(row)).read_text())
    assert kept["value"] == pytest.approx(np.mean(list(kept["subjects"].values())))
    with (out / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and all(float(row["seconds"]) > 0 and row["bench"] for row in rows)
    assert all((float(row["pretraining_seconds"]) > 0) == (row["method"] == "simmim") for row in rows)
    again = next(row for row in made if "scratch" in str(row) and "cells" in str(row))
    before = json.loads(again.read_text())["subjects"]
    again.unlink()
    assert main(command) == 0, "the rest goes on"
    assert json.loads(again.read_text())["subjects"] == before, "the same run gives the same figures"
    assert all(row.stat().st_mtime_ns == stamp for row, stamp in made.items() if row != again), "nothing twice"
    settings["readouts"]["full"]["fit"][-1] = "bf16-mixed"  # type: ignore[index]
    path.write_text(yaml.safe_dump(settings))
    assert main([*command, "--dry-run"]) == 0
    assert "4 runs were made with other settings, such as" in capfd.readouterr().out
    assert main(command) == 2
    assert f"4 runs were made with other settings, and nothing is trained beside them: {out}" in capfd.readouterr().err
    assert main([*command, "--redo", "--tables"]) == 0, capfd.readouterr().err
    aside = out / "replaced" / "cells" / "full"
    assert len(list(aside.rglob("row.json"))) == 4 and not list((out / "cells").rglob("row.json"))
    assert len(list((out / "pretraining").rglob("row.json"))) == 2, "which the setting is not of"
    capfd.readouterr()
    assert main([*command, "--dry-run"]) == 0
    assert "2 pretrainings (2 done) and 4 cells (0 done)" in capfd.readouterr().out


@pytest.mark.slow
def test_bench__equal_time_and_probes_from_beginning_to_end(
    make_cache: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    cache = make_cache(tmp_path / "c.h5", splits=["train"] * 5 + ["val", "test", "test"])
    path, out = write_small_bench(tmp_path / "bench.yaml"), tmp_path / "out"
    command = ["bench", "--config", str(path), "--cache", str(cache), "--out", str(out)]
    assert main([*command, "--share", "0/3"]) == main([*command, "--share", "1/3"]) == 0, capfd.readouterr().err
    assert main([*command, "--share", "1/4"]) == 0, "simmim's part"
    assert main(command) == 0, capfd.readouterr().err
    with (out / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2
    steps = {row["method"]: int(row["pretraining_steps"]) for row in rows}
    assert steps["scratch"] == 0 and steps["simmim"] == steps["mae"] == 6
    speed = {name: seconds_per_step(out / "pretraining" / name / "seed0") for name in ("simmim", "mae")}
    assert steps["simmim-equal-time"] == round(6 * speed["mae"] / speed["simmim"])
    log = (out / "pretraining" / "simmim-equal-time" / "seed0" / "metrics.csv").read_text()
    assert (
        len(log.splitlines()) > 1
        and f"simmim-equal-time {steps['simmim-equal-time']}" in (out / "tables.md").read_text()
    )
    made = {row: row.stat().st_mtime_ns for row in out.rglob("row.json")}
    assert main(command) == 0 and all(row.stat().st_mtime_ns == stamp for row, stamp in made.items()), "nothing twice"
    elsewhere = yaml.safe_load(path.read_text()) | {"equal_time": None}
    elsewhere["methods"] = {"scratch": {}, "mae": {"encoders": ["out/pretraining/mae/seed0"]}}
    path.write_text(yaml.safe_dump(elsewhere))
    assert main([*command[:-1], str(tmp_path / "again")]) == 0, capfd.readouterr().err
    with (tmp_path / "again" / "rows.csv").open() as file:
        again = list(csv.DictReader(file))
    same = [(row["method"], row["labels"], row["value"]) for row in rows if row["method"] in ("scratch", "mae")]
    assert [(row["method"], row["labels"], row["value"]) for row in again] == same, "as if pretrained by the bench"
    assert not (tmp_path / "again" / "pretraining").exists()
    assert "6 steps of pretraining (mae; mae elsewhere)" in (tmp_path / "again" / "tables.md").read_text()
    shutil.rmtree(out / "pretraining" / "mae" / "seed0")
    assert main([*command[:-1], str(tmp_path / "third")]) == 2
    assert "methods.mae.encoders names" in capfd.readouterr().err


@pytest.mark.slow
def test_bench__an_encoder_that_has_seen_test_subjects_is_refused(
    make_cache: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    conf = ROOT / "conf"
    seen = make_cache(tmp_path / "seen.h5", splits=["train"] * 8)
    cache = make_cache(tmp_path / "asked.h5", splits=["train"] * 6 + ["test"] * 2)
    small = ["--data.num_workers", "0", "--data.global_batch_size", "2"]
    words = ["--config", str(conf / "experiment" / "small.yaml"), "--model", str(conf / "method" / "simmim.yaml")]
    task = ["--config", str(conf / "experiment" / "segmentation_small.yaml"), *small]
    settings = Bench(
        methods={"scratch": Method(), "simmim": Method([*words, *small])},
        readouts={"fit": Readout(task, [1]), "knn": Readout(probe="knn-seg", window_vox=[32, 32, 32])},
        labels=[2],
        pretrain_steps=2,
        seeds=1,
        draws=1,
        backbone=str(conf / "backbone" / "vit_tiny_p8.yaml"),
    )
    before = next(one for c in list_cells(settings, str(seen), tmp_path) if (one := c.pretraining) is not None)
    pretrain(before, Job(settings, str(seen), "c"))
    cells = [c for c in list_cells(settings, str(cache), tmp_path) if c.method == "simmim"]
    job = Job(settings, str(cache), "c")
    tasks = {c.readout: (train_and_measure, c, job) if c.fit else (probe, [c], job) for c in cells}
    failed = dict(side_by_side(tasks, 1))
    assert set(failed) == {"fit", "knn"}
    assert all(
        "trained on cases that figures would be measured on: of the split 'test' 2 of 2" in r for r in failed.values()
    )
    assert all(state_of(cell) == "missing" for cell in cells)
    honest = tmp_path / "honest"
    cells = [c for c in list_cells(settings, str(cache), honest) if c.method == "simmim"]
    assert cells[0].pretraining is not None
    pretrain(cells[0].pretraining, job)
    train_and_measure(cells[0], job)
    probe(cells[1:], job)
    assert all(state_of(cell) == "done" for cell in cells)
    told = {json.loads((cell.folder / "row.json").read_text())["leakage"] for cell in cells}
    assert len(told) == 1 and told.pop().startswith("incompletely checked: subject keys were made with different")
    warned = replace(settings, fit_common=["--data.leakage", "warn"])
    knowingly = next(c for c in list_cells(warned, str(cache), tmp_path / "warned") if c.method == "simmim" and c.fit)
    assert knowingly.pretraining is not None
    shutil.copytree(before.folder, knowingly.pretraining.folder)
    train_and_measure(knowingly, Job(warned, str(cache), "c"))
    assert (
        "seen of the split 'test' 2 of 2 subjects" in json.loads((knowingly.folder / "row.json").read_text())["leakage"]
    )
