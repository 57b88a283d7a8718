"""The work of a bench shared by an array of jobs under a real SLURM."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from made_bench import write_small_bench

from agssd.cli import main
from agssd.commands._slurm_of_one_machine import OneMachine

pytestmark = [pytest.mark.ddp, pytest.mark.slow]


def test_bench__two_arrays_do_all_of_it_and_the_tables_are_of_all(
    slurm: OneMachine, make_cache: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = make_cache(tmp_path / "c.h5", splits=["train"] * 5 + ["val", "test", "test"])
    path, out = write_small_bench(tmp_path / "bench.yaml"), tmp_path / "out"
    words = ["bench", "--config", str(path), "--cache", str(cache), "--out", str(out)]
    share = [sys.executable, "-m", "agssd", *words, "--share", "$SLURM_ARRAY_TASK_ID/3"]
    log = tmp_path / "log-%A_%a.txt"
    array = ["sbatch", "--parsable", "--array=0-2", f"--output={log}", f"--wrap={' '.join(share)}"]
    first = slurm.call(*array, check=True)
    slurm.call(*array, f"--dependency=afterany:{first}", check=True)
    ends = time.monotonic() + 400
    while slurm.call("squeue", "-h"):
        assert time.monotonic() < ends, slurm.call("squeue")
        time.sleep(0.5)
    said = "\n".join(one.read_text() for one in sorted(tmp_path.glob("log-*")))
    assert len(list(tmp_path.glob("log-*"))) == 6 and "Traceback" not in said and "error" not in said, said
    assert not (out / "rows.csv").exists(), "what all shares would write, none writes"
    assert main([*words, "--tables"]) == 0
    with (out / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2, said + capsys.readouterr().err
    assert {row["method"] for row in rows} == {"scratch", "simmim", "simmim-equal-time", "mae"}


def test_bench__told_that_its_time_is_up_its_job_goes_back_once_and_on(
    slurm: OneMachine, make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    cache = make_cache(tmp_path / "c.h5", splits=["train"] * 5 + ["val", "test", "test"])
    path, out, log = write_small_bench(tmp_path / "bench.yaml"), tmp_path / "out", tmp_path / "log.txt"
    settings = yaml.safe_load(path.read_text())
    del settings["methods"]["mae"]
    path.write_text(yaml.safe_dump(settings | {"equal_time": None, "pretrain_steps": 400, "seeds": 2}))
    words = [sys.executable, "-m", "agssd", "bench", "--config", str(path), "--cache", str(cache), "--out", str(out)]
    options = ["--requeue", "--open-mode=append", f"--output={log}", "--cpus-per-task=2"]
    job = slurm.call("sbatch", "--parsable", *options, f"--wrap=srun {' '.join(words)} --workers 2", check=True)
    runs = [out / "pretraining" / "simmim" / f"seed{seed}" for seed in (0, 1)]

    def until(done: Callable[[], bool], what: str) -> None:
        ends = time.monotonic() + 300
        while not done():
            assert time.monotonic() < ends, f"{what}: {log.read_text() if log.exists() else ''}"
            time.sleep(0.2)

    until(lambda: all(len(_steps(run)) >= 20 for run in runs), "both train")
    slurm.call("scancel", "--signal=USR1", job, check=True)
    until(lambda: f"job {job} is back in the queue" in log.read_text(), "back in the queue")
    until(lambda: slurm.state(job) == "PENDING", "waits")
    before = [_steps(run) for run in runs]
    assert all(20 <= len(steps) < 400 for steps in before), "saved on the way"
    slurm.start_now(job)
    until(lambda: slurm.state(job) == "COMPLETED", "the end")
    for run, steps in zip(runs, before, strict=True):
        assert _steps(run) == sorted(set(_steps(run))) and _steps(run)[: len(steps)] == steps, "went on, not anew"
        assert json.loads((run / "row.json").read_text())["steps"] == 400
    assert slurm.fields(job)["Restarts"] == "1", "the bench puts the job back, and no training of it besides"
    with (out / "rows.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * 2 * 2


def _steps(run: Path) -> list[int]:
    """Return the steps whose loss a pretraining has written."""
    if not (run / "metrics.csv").is_file():
        return []
    with (run / "metrics.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row.get("train/loss")]
