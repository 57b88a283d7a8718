"""Two ranks under a real SLURM: signalled, requeued, resumed and cancelled."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from paced_runs import STEPS, Runs

from agssd.commands._slurm_of_one_machine import OneMachine

pytestmark = pytest.mark.ddp
HOLD = 6  # the step
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "PREEMPTED", "TIMEOUT", "NODE_FAIL")


def wait(until: Callable[[], object], what: str, log: Path, seconds: float = 240.0) -> None:
    ends = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < ends, f"{what}: not after {seconds:.0f} s\n{log.read_text() if log.exists() else ''}"
        time.sleep(0.2)


def submit(runs: Runs, slurm: OneMachine, run: str, *flags: str) -> tuple[str, Path]:
    """Submit a run that stays in a step until it is told to stop, however long that takes; return its job and log."""
    command = [sys.executable, "-m", "agssd", "submit", "--config", str(runs.experiment), "--cluster"]
    command += [str(runs.cluster), "--trainer.default_root_dir", str(runs.folder / run), *flags]
    of_slurm = {key: slurm.environment[key] for key in ("PATH", "SLURM_CONF")}
    environment = runs.environment(TOY_HOLD=str(HOLD), **of_slurm)
    done = subprocess.run(command, env=environment, cwd=runs.folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = re.match(r"job (\d+), run directory ", done.stdout)
    assert found, done.stdout
    log = runs.folder / run / f"slurm-{found[1]}.log"
    assert f"squeue --job {found[1]}" in done.stdout and f"/slurm-{found[1]}.log" in done.stdout
    return found[1], log


def wait_for_steps(runs: Runs, slurm: OneMachine, run: str, job: str, log: Path, steps: int) -> None:
    wait(lambda: len(runs.steps(run)) >= steps or slurm.state(job) in ENDS, f"{steps} steps", log)
    assert len(runs.steps(run)) >= steps, log.read_text()


def hasten(slurm: OneMachine, job: str, log: Path, *changes: str) -> None:
    """Let a requeued job start at once, where SLURM makes it wait two minutes."""
    wait(lambda: slurm.state(job) == "PENDING", "pending", log)
    slurm.start_now(job, *changes)


def test_slurm__signalled_job_is_requeued_and_ends_like_an_undisturbed_one(
    runs: Runs, slurm: OneMachine, record_property: Callable[[str, object], None]
) -> None:
    job, log = submit(runs, slurm, "signalled", "--wandb.mode", "offline")
    wait_for_steps(runs, slurm, "signalled", job, log, 3)
    slurm.call("scancel", "--signal=USR1", job, check=True)
    told = time.monotonic()
    wait(lambda: "back in the queue" in log.read_text(), "requeued", log)
    record_property("printed", f"SLURM: back in the queue {time.monotonic() - told:.1f} s after the signal")
    hasten(slurm, job, log)
    wait(lambda: slurm.state(job) in ENDS, "the end", log)
    assert slurm.state(job) == "COMPLETED", log.read_text()
    said = log.read_text()
    ((stopped, seconds),) = re.findall(r"stopped after step (\d+), ([\d.]+) s after the signal; job", said)
    assert 3 <= int(stopped) <= HOLD + 1 and float(seconds) < 60 and "ends because of another" not in said
    assert f"SLURM job {job}, started for the 2. time" in said and f"step {stopped} of {STEPS}" in said
    runs.assert_equal("signalled", "undisturbed")
    folder = runs.folder / "signalled"
    assert not list(folder.glob("**/hpc_ckpt*"))
    (wandb_id,) = {path.name.rpartition("-")[2] for path in folder.glob("wandb/offline-run-*")}
    assert wandb_id == (folder / "wandb_id").read_text() and len(list(folder.glob("wandb/offline-run-*"))) == 2


@pytest.mark.slow
def test_slurm__cancelled_job_is_saved_and_stays_cancelled(runs: Runs, slurm: OneMachine) -> None:
    job, log = submit(runs, slurm, "cancelled", "--partition", "low", "--wandb.mode", "offline")
    wait_for_steps(runs, slurm, "cancelled", job, log, 2)
    script = str(runs.folder / "cancelled/submit.sh")
    second = slurm.call("sbatch", "--parsable", script, check=True)  # the same run directory
    wait(lambda: slurm.fields(second).get("Reason") == "Dependency", "the second job waits for the first", log, 30)
    slurm.call("scancel", second, check=True)
    slurm.call("scancel", job, check=True)
    wait(lambda: slurm.state(job) not in ("RUNNING", "COMPLETING"), "the end", log)
    assert slurm.state(job) == "CANCELLED" and slurm.fields(job).get("PreemptTime", "None") == "None"
    assert f"job {job} is cancelled and not put back into the queue" in log.read_text()
    assert (runs.folder / "cancelled/checkpoints/last.ckpt").is_file()
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_slurm__job_that_is_preempted_without_grace_goes_on_by_itself(runs: Runs, slurm: OneMachine) -> None:
    job, log = submit(runs, slurm, "preempted", "--partition", "low", "--wandb.mode", "offline")
    wait_for_steps(runs, slurm, "preempted", job, log, 2)
    urgent = ["--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"]
    first = slurm.call("sbatch", "--parsable", *urgent, check=True)
    wait(lambda: slurm.state(first) == "COMPLETED", "the job with priority", log)
    assert f"job {job} is back in the queue" in log.read_text(), log.read_text()
    assert slurm.state(job) == "PENDING"
    hasten(slurm, job, log)
    wait(lambda: slurm.state(job) in ENDS, "the end", log)
    assert slurm.state(job) == "COMPLETED", log.read_text()
    runs.assert_equal("preempted", "undisturbed")


@pytest.mark.slow
def test_slurm__job_whose_time_is_up_goes_on_by_itself(runs: Runs, slurm: OneMachine) -> None:
    # SLURM looks every 30 s and signals up to 30 s early: 30 to 60 s after the start, so that the run listens by then
    job, log = submit(runs, slurm, "limited", "--time", "3", "--signal-seconds", "120")
    wait(lambda: log.is_file() and "back in the queue" in log.read_text(), "requeued", log)
    hasten(slurm, job, log, "TimeLimit=60")
    wait(lambda: slurm.state(job) in ENDS, "the end", log)
    assert slurm.state(job) == "COMPLETED", log.read_text()
    assert log.read_text().count("back in the queue") == 1
    runs.assert_equal("limited", "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["rank 0", "rank 1", "torchrun"])
def test_signal__run_without_slurm_ends_with_75_and_the_same_command_goes_on(runs: Runs, how: str) -> None:
    command = runs.torchrun(how, "--nproc-per-node", "2", "--standalone") if how == "torchrun" else runs.plain(how)
    run = runs.start(command, 0.3)
    try:
        wait(lambda: len(runs.steps(how)) >= 3, "three steps", Path(os.devnull))
        os.kill(second_rank(run.pid) if how == "rank 1" else run.pid, signal.SIGTERM)
        said, _ = run.communicate(timeout=240)
    finally:
        run.kill()
    assert run.returncode == (1 if how == "torchrun" else 75), said  # torchrun has one code for every failure
    assert "the same command goes on" in said and "ends because of another" not in said
    again = runs.start(command)
    said, _ = again.communicate(timeout=600)
    assert again.returncode == 0, said
    runs.assert_equal(how, "undisturbed")


def second_rank(first: int) -> int:
    """Return the process that Lightning has started beside the process ``first``."""
    for number in Path(f"/proc/{first}/task/{first}/children").read_text().split():
        if b"LOCAL_RANK=1" in Path(f"/proc/{number}/environ").read_bytes().split(b"\0"):
            return int(number)
    raise AssertionError(f"process {first} has started no second rank")
