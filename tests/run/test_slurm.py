"""Back into the queue, where ``scontrol`` is ended together with the job that asks it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agssd.run.slurm import requeue

SCONTROL = """#!/bin/sh
case $1 in
    show) echo "JobId=7 JobState=$(cat {state}) Restarts=$(cat {restarts}) Reason=None" ;;
    requeue) {on_requeue} kill -TERM $$ ;;
esac
"""


@pytest.fixture
def in_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have this process be in job 7, and return the folder whose ``scontrol`` it finds first."""
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "state").write_text("RUNNING")
    (tmp_path / "restarts").write_text("0")
    return tmp_path


def _write(folder: Path, on_requeue: str) -> None:
    text = SCONTROL.format(state=folder / "state", restarts=folder / "restarts", on_requeue=on_requeue)
    (folder / "scontrol").write_text(text)
    (folder / "scontrol").chmod(0o755)


def test_requeue__scontrol_that_dies_with_the_job_has_put_it_back(in_a_job: Path) -> None:
    _write(in_a_job, f"echo 1 > {in_a_job / 'restarts'}; echo COMPLETING > {in_a_job / 'state'};")
    assert requeue() == "job 7 is back in the queue"


def test_requeue__scontrol_that_dies_before_slurm_agrees_is_told(in_a_job: Path) -> None:
    _write(in_a_job, "")
    with pytest.raises(OSError, match=r"requeue 7: ended by signal 15, so .* do it with: scontrol requeue 7"):
        requeue()
