"""`agssd check` as two tasks of a real SLURM step: one table, and the exit code of a rank that fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from one_machine import OneMachine
from paced_runs import Runs

pytestmark = [pytest.mark.ddp, pytest.mark.slow]
CONF = Path(__file__).resolve().parents[2] / "conf"


def check(slurm: OneMachine, runs: Runs, folder: Path, cache: str) -> subprocess.CompletedProcess[str]:
    command = ["srun", "--nodes=1", "--ntasks-per-node=2", "--job-name=check", sys.executable, "-m", "agssd", "check"]
    command += ["--config", str(CONF / "experiment/agssd_small.yaml"), "--config", str(CONF / "cluster/ddp2_cpu.yaml")]
    command += ["--data.global_batch_size", "2", "--data.num_workers", "0", "--data.cache", cache]
    command += ["--trainer.default_root_dir", str(folder / "run"), "--timeout", "120"]
    environment = runs.environment(0.0) | {key: slurm.environment[key] for key in ("PATH", "SLURM_CONF")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_check__two_tasks_of_a_step(runs: Runs, slurm: OneMachine, tmp_path: Path) -> None:
    well = check(slurm, runs, tmp_path, str(runs.folder / "tiny.h5"))
    assert well.returncode == 0, well.stdout + well.stderr[-3000:]
    assert well.stdout.count("all-reduce") == 1, "one table"
    assert "2 ranks over gloo" in well.stdout and "identical on every rank" in well.stdout
    assert "finite on all 2" in well.stdout
    ill = check(slurm, runs, tmp_path, str(tmp_path / "gone.h5"))
    assert ill.returncode == 1 and "FAIL  cache" in ill.stdout, ill.stdout + ill.stderr[-3000:]
