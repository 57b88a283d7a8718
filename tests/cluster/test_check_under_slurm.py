"""`agssd check` as two tasks of a real SLURM step: one table, and the exit code of a rank that fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agssd.commands._slurm_of_one_machine import OneMachine

pytestmark = [pytest.mark.ddp, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]


def check(slurm: OneMachine, folder: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    command = ["srun", "--nodes=1", "--ntasks-per-node=2", "--job-name=check", sys.executable, "-m", "agssd", "check"]
    for config in ("experiment/agssd_small.yaml", "cluster/ddp2_cpu.yaml"):
        command += ["--config", str(ROOT / "conf" / config)]
    command += ["--data.global_batch_size", "2", "--data.num_workers", "0", "--data.cache", str(cache)]
    command += ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(folder / "run"), "--timeout", "120"]
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    lean = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": paths}
    return subprocess.run(command, env=slurm.environment | lean, capture_output=True, text=True, timeout=600)


def test_check__two_tasks_of_a_step(slurm: OneMachine, tiny_cache: Path, tmp_path: Path) -> None:
    well = check(slurm, tmp_path, tiny_cache)
    assert well.returncode == 0, well.stdout + well.stderr[-3000:]
    assert well.stdout.count("all-reduce") == 1, "one table"
    assert "2 ranks over gloo" in well.stdout and "identical on every rank" in well.stdout
    assert "finite on all 2" in well.stdout
    ill = check(slurm, tmp_path, tmp_path / "gone.h5")
    assert ill.returncode == 1 and "FAIL  cache" in ill.stdout, ill.stdout + ill.stderr[-3000:]
