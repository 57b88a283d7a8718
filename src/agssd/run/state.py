"""What a run says about itself in ``DIR/state.json``, and whether it still lives; names of files of a run.

The file holds plain values and no path: the state with its reason, step and length of the run, host, process and SLURM
job, and when it was written. A process that is killed writes nothing any more; that is told from its silence.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Literal

from agssd.whole_file import whole_file

STATE = "state.json"
CONFIG, METRICS, ACTIONS, CHECKPOINTS, WANDB_ID = (
    "config.yaml",
    "metrics.csv",
    "actions.jsonl",
    "checkpoints",
    "wandb_id",
)
FORMAT = 1
State = Literal["running", "finished", "preempted", "stopped", "interrupted", "failed"]
_SILENT = 4  # rhythms without a sign of life after which a process of another machine counts as dead
_LEAST_S = 120.0  # what a shared file system may take to show a file as it is


def now() -> str:
    """Return the time as files of a run state it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def this_process() -> dict[str, Any]:
    """Return what tells this process from every other: host, machine as booted, process and when it was born."""
    return {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "born": _born(os.getpid())}


def write_state(directory: Path, state: dict[str, Any]) -> None:
    """Write ``state.json`` of a run whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    with whole_file(directory / STATE) as temporary:
        temporary.write_text(json.dumps({"format": FORMAT, **state}, indent=1) + "\n")


def read_state(directory: Path) -> dict[str, Any] | None:
    """Return the content of ``state.json``, None where there is none.

    Raises:
        ValueError: if it is torn or of another program.
    """
    path = directory / STATE
    try:
        state = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("step"), int):
        raise ValueError(f"{path} is no state of a run, or of another version of agssd")
    return state


def lives(state: dict[str, Any], silent_s: float) -> bool:
    """Return whether the process that wrote ``state`` still runs.

    On the machine where it was started the process itself is looked for. From anywhere else (another host, a container)
    it cannot be seen, and counts as alive until it has been silent for four of its rhythms, at least two minutes.

    Args:
        state: of :func:`read_state`.
        silent_s: seconds since the file was written, by the clock of the file system.
    """
    if state.get("machine") and state["machine"] == _machine():
        return state.get("born") is not None and _born(int(state["pid"])) == state["born"]
    return silent_s < max(_SILENT * float(state.get("every_s", 0.0)), _LEAST_S)


def refuse_beside_another(directory: Path, job: str | None) -> None:
    """Refuse a run directory in which another process still runs.

    The job that is started again in its own directory goes on: SLURM has seen its earlier processes end.

    Args:
        directory: of the run.
        job: the SLURM job of this process.

    Raises:
        ValueError: naming the other process and what to do.
    """
    try:
        state = read_state(directory)
        silent_s = time.time() - (directory / STATE).stat().st_mtime
    except (OSError, ValueError):
        return
    if state is None or state.get("state") != "running" or (job is not None and state.get("slurm_job") == job):
        return
    if lives(state, silent_s):
        of_job = f" of SLURM job {state['slurm_job']}" if state.get("slurm_job") else ""
        raise ValueError(
            f"another run goes on in {directory}: process {state.get('pid')}{of_job} on {state.get('host')}, last "
            f"heard of {silent_s:.0f} s ago. End it or wait for its end (one on another machine that was killed counts "
            "as alive for two minutes), or name another --trainer.default_root_dir"
        )


def settle_finished(directory: Path) -> str:
    """Have the state of a run that has taken all its steps say ``finished``, and return what its end left out, if any.

    A run that was ended between its last step and its end has said something else.
    """
    try:
        state = read_state(directory)
    except ValueError:
        return ""
    if state is None or state.get("state") in ("finished", "stopped"):
        return ""
    reason = (
        f"{state.get('state')} between its last step and its end: a validation, a probe and best.ckpt of the last step "
        "may be left out"
    )
    write_state(directory, state | {"state": "finished", "reason": reason, "written": now()})
    return reason


def _machine() -> str | None:
    """Return the boot of this machine and the name space of processes, in which a pid means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def _born(pid: int) -> int | None:
    """Return the start of a process in clock ticks since the boot, None for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
