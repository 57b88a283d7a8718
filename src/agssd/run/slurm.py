"""What a job asks of SLURM about itself, and how it goes back into the queue."""

from __future__ import annotations

import os
import subprocess

_ANSWER_S = 20  # a controller that takes longer is down


def job() -> str | None:
    """Return this job as ``scontrol`` names it, ``ARRAY_TASK`` in an array; None outside SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID") or None


def restarts() -> int:
    """Return how often this job has been put back into the queue."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def requeue() -> str:
    """Put this job back into the queue, as one process of it must, and return what has become of it.

    A job that its user has cancelled stays cancelled: SLURM would start it again if it were asked to. One that SLURM
    has put back itself, as it does with what it preempts, is left alone.

    Raises:
        OSError: if ``scontrol`` is not found, does not answer or refuses, with what to do.
    """
    name = job()
    if name is None:
        raise OSError("this process is in no SLURM job; start it again with the same command")
    state = _state(name)
    if _put_back(state):
        return f"SLURM has put job {name} back into the queue"
    preempted = state.get("PreemptTime", "None") != "None"  # all that tells it from a cancelled one without grace time
    if state.get("JobState") != "RUNNING" and not preempted and state.get("Reason") not in ("TimeLimit", "Preempted"):
        return f"job {name} is cancelled and not put back into the queue; scontrol requeue {name} does"
    try:
        _scontrol("requeue", name)
    except OSError:
        # SLURM ends the job, and scontrol in it, as soon as it agrees; that may be before scontrol has heard of it.
        if not _put_back(_state(name)):
            raise
    return f"job {name} is back in the queue"


def _state(name: str) -> dict[str, str]:
    line = _scontrol("show", "job", "--oneliner", name)
    return dict(field.partition("=")[::2] for field in line.split())


def _put_back(state: dict[str, str]) -> bool:
    """Return whether the job is to start once more than it had when this process began."""
    return int(state.get("Restarts", "0")) > restarts()


def _scontrol(*arguments: str) -> str:
    command = ["scontrol", *arguments]
    remedy = f"the job is not put back into the queue; do it with: scontrol requeue {job()}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, start_new_session=True)
    except FileNotFoundError as error:
        raise OSError(f"scontrol is not found where the job runs, so {remedy}") from error
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{' '.join(command)} gave no answer in {_ANSWER_S} s, so {remedy}") from error
    if done.returncode:
        why = done.stderr.strip() or f"ended by signal {-done.returncode}" * (done.returncode < 0) or "failed"
        raise OSError(f"{' '.join(command)}: {why}, so {remedy}")
    return done.stdout
