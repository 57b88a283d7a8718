"""``agssd runs``: what is listed is what the files say, a dead run is not called running, nothing breaks the list."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from agssd.cli import main
from agssd.commands import _run_reader
from agssd.commands._run_reader import newest_figures, read_curves
from agssd.run.state import now, this_process, write_state


def make_run(directory: Path, max_steps: int = 100, rows: list[dict[str, Any]] | None = None) -> Path:
    """Write configuration and metrics of a run."""
    (directory / "checkpoints").mkdir(parents=True)
    config = {"model": {"class_path": "agssd.methods.agssd.AGSSD"}, "trainer": {"max_steps": max_steps}}
    (directory / "config.yaml").write_text("# lightning.pytorch==2.6.6\n" + yaml.safe_dump(config))
    if rows:
        names = sorted({name for row in rows for name in row})
        lines = [",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in rows)]
        (directory / "metrics.csv").write_text("\n".join(lines) + "\n")
    return directory


def say(directory: Path, state: str, step: int, **more: Any) -> None:
    common = {"reason": "", "max_steps": 100, "every_s": 30.0, "started": now(), "written": now(), "agssd": "0.1.0"}
    write_state(directory, {**common, **this_process(), "state": state, "step": step, **more})


def listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    assert main(["runs", "--json", str(folder)]) == 0
    return {Path(one["directory"]).name: one for one in json.loads(capsys.readouterr().out)}


def dead() -> dict[str, Any]:
    """Return the identity of a process of this machine that has ended."""
    code = "import json; from agssd.run.state import this_process; print(json.dumps(this_process()))"
    told: dict[str, Any] = json.loads(subprocess.check_output([sys.executable, "-c", code], text=True))
    return told


def test_runs__figures_and_where_they_came_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [{"step": step, "train/loss": 5.0 - 0.1 * step} for step in range(30)]
    rows[19] |= {"probe/linear_seg_dice": 0.61, "probe/knn_seg_dice": 0.5, "probe/step": 20.0}
    rows[24] |= {"throughput/samples_per_s": 812.0, "collapse/alarms": 2.0}
    run = make_run(tmp_path / "a", rows=rows)
    for step in (10, 20):
        (run / f"checkpoints/step{step:08d}.ckpt").touch()
    (run / "checkpoints/last.ckpt").touch()
    (run / "wandb_id").write_text("a1b2c3d4")
    (run / "actions.jsonl").write_text('{"step": 24, "action": "alarm", "alarm": "cls_uniform"}\n{"torn')
    say(run, "running", 28, commit="50ee880", slurm_job="17")
    one = listed(tmp_path, capsys)["a"]
    assert (one["method"], one["state"], one["step"], one["max_steps"]) == ("AGSSD", "running", 30, 100)
    assert one["loss"] == pytest.approx(2.1) and one["loss_step"] == 29
    assert abs(one["loss_time"] - time.time()) < 600
    assert one["checkpoint"] == "step00000020.ckpt" and one["checkpoint_step"] == 20
    assert (one["probe"], one["probe_value"], one["probe_step"]) == ("probe/linear_seg_dice", 0.61, 20)
    assert one["samples_per_s"] == 812.0 and one["alarms"] == 2 and one["last_action"]["alarm"] == "cls_uniform"
    assert (one["agssd"], one["commit"], one["wandb_id"], one["slurm_job"]) == ("0.1.0", "50ee880", "a1b2c3d4", "17")
    assert any("actions.jsonl" in note for note in one["notes"])
    assert main(["runs", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "actions.jsonl" in err
    for text in ("30/100 (30.0 %)", "2.1 @29", "step00000020.ckpt", "812", "linear_seg_dice 0.610 @20", "2 alarm(s)",
                 "cls_uniform @24", "0.1.0 50ee880", "job 17", "W&B a1b2c3d4"):  # fmt: skip
        assert text in out, text


def test_runs__states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"step": step, "train/loss": 1.0} for step in range(7)]
    for name in ("alive", "killed", "elsewhere", "silent", "finished", "preempted", "stopped", "failed", "stuck"):
        make_run(tmp_path / name, rows=rows)
    say(tmp_path / "alive", "running", 5)
    say(tmp_path / "killed", "running", 5, **dead())
    for name, silent_s in (("elsewhere", 60), ("silent", 600)):
        say(tmp_path / name, "running", 5, machine="another/1", host="node7")
        os.utime(tmp_path / name / "state.json", times=(time.time() - silent_s,) * 2)
    say(tmp_path / "finished", "finished", 100)
    say(tmp_path / "preempted", "preempted", 5)
    say(tmp_path / "stopped", "stopped", 5, reason="cls outputs are uniform")
    say(tmp_path / "failed", "failed", 5, reason="OSError")
    say(tmp_path / "stuck", "running", 5, stepped="2026-01-01T00:00:00Z")
    for name in ("unborn", "failed_at_start"):
        make_run(tmp_path / name)
    say(tmp_path / "unborn", "running", 0, **dead())
    say(tmp_path / "failed_at_start", "failed", 0, reason="ValueError")
    found = listed(tmp_path, capsys)
    assert {name: one["state"] for name, one in found.items()} == {
        "alive": "running",
        "killed": "interrupted",
        "elsewhere": "running",
        "silent": "interrupted",
        "finished": "finished",
        "preempted": "preempted",
        "stopped": "stopped",
        "failed": "failed",
        "stuck": "running",
        "unborn": "never started",
        "failed_at_start": "never started",
    }
    assert found["killed"]["step"] == found["alive"]["step"] == 7  # rows after the last sign of life count
    assert found["failed"]["step"] == 5  # it said so itself
    assert "node7" in found["silent"]["reason"] and "uniform" in found["stopped"]["reason"]
    assert "no step for" in found["stuck"]["reason"] and not found["alive"]["reason"]
    assert "failed: ValueError" in found["failed_at_start"]["reason"]


def test_runs__without_a_state_only_what_the_files_prove(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"step": step, "train/loss": 1.0} for step in range(7)]
    for name in ("done", "young", "old", "stop"):
        make_run(tmp_path / name, rows=rows)
    make_run(tmp_path / "empty")
    (tmp_path / "done/checkpoints/step00000100.ckpt").touch()
    (tmp_path / "stop/actions.jsonl").write_text('{"step": 7, "action": "stop", "reason": "peaked"}\n')
    for path in (tmp_path / "old").rglob("*"):
        os.utime(path, (1e9, 1e9))
    states = {name: one["state"] for name, one in listed(tmp_path, capsys).items()}
    expected = {"done": "finished", "young": "unknown", "old": "interrupted", "stop": "stopped"}
    assert states == expected | {"empty": "never started"}


def test_runs__torn_and_foreign_directories_are_named_and_the_rest_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "good", rows=[{"step": 0, "train/loss": 1.0}])
    make_run(tmp_path / "torn_state")
    (tmp_path / "torn_state/state.json").write_text('{"format"')
    make_run(tmp_path / "torn_metrics")
    (tmp_path / "torn_metrics/metrics.csv").write_text("")
    make_run(tmp_path / "torn_row")
    (tmp_path / "torn_row/metrics.csv").write_text("step,train/loss\n0,1.0\n1,2.0\n2,3")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/config.yaml").write_text("- a list")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.yaml").write_text("a: [")
    (tmp_path / "good/wandb/files").mkdir(parents=True)
    (tmp_path / "good/wandb/files/config.yaml").write_text("wandb: 1")
    assert main(["runs", "--json", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    found = {Path(one["directory"]).name: one for one in json.loads(out)}
    assert set(found) == {"good", "torn_state", "torn_metrics", "torn_row"}
    assert found["torn_row"]["loss"] == 2.0 and found["torn_row"]["step"] == 2
    for name in ("torn_state", "torn_metrics", "foreign", "broken"):
        assert f"{name}" in err, name
    assert "wandb" not in err


def test_runs__last_changed_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ages = {"b": 300, "c": 50, "a": 4000}
    for name, seconds in ages.items():
        run = make_run(tmp_path / "deep" / name)
        for path in run.rglob("*"):
            os.utime(path, (time.time() - seconds,) * 2)
    assert list(listed(tmp_path, capsys)) == ["c", "b", "a"]
    assert main(["runs", str(tmp_path / "deep/a")]) == 0  # a run directory itself
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_runs__nothing_found_and_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 1
    assert main(["runs", str(tmp_path / "gone")]) == 2
    assert "gone" in capsys.readouterr().err


def test_runs__imports_no_torch() -> None:
    code = "import sys; from agssd.cli import main; main(['runs', sys.argv[1]]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True)
    assert done.stdout.split() == ["False"]


def test_newest_figures__end_of_a_long_table_says_what_all_of_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    rows = [{"step": step, "train/loss": rng.normal()} for step in range(500)]
    for step in (3, 250, 470):
        rows[step]["probe/knn_seg_dice"] = rng.normal()
    rows[2]["probe/seconds"] = 1.5
    path = make_run(tmp_path / "a", rows=rows) / "metrics.csv"
    curves = read_curves(path)
    expected = {name: (curve[max(curve)], max(curve)) for name, curve in curves.items()} | {"step": (499.0, 499)}
    for tail in (1, 100, 1000, 5000, 10**6):
        monkeypatch.setattr(_run_reader, "_TAIL", tail)
        assert newest_figures(path, ("train/loss", "probe/")) == expected
