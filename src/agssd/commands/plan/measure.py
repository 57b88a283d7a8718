"""One real optimiser step in a process of its own: its peak memory and its time.

On a CPU the peak is that of resident memory (``VmHWM`` of Linux), less what was resident before the model was built. A
first rehearsal is thrown away, so that libraries and their kernels are loaded and do not count, and glibc is told to
give every block above 64 KiB back at once, so that what was freed does not count either. On CUDA it is
``torch.cuda.max_memory_allocated``.

Of ``conf/experiment/agssd_small.yaml`` with 4 samples this found 101.4 MiB where torch's profiler (``profile_memory``)
counted 100.4 MiB (2-core x86-64 CPU, one thread, 2026-11-21).
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

from agssd.commands.plan.rehearsal import Stage, Step, rehearse, set_stage
from agssd.methods.base import PretrainModule
from agssd.types import ParentBatch

_GLIBC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
_TIMED = 3


class Measured(NamedTuple):
    """What one real step told.

    Attributes:
        bytes: at the peak.
        seconds: of the quickest of three optimiser steps, per micro-batch.
    """

    bytes: int
    seconds: float


def measure_in_child(of_fit: Sequence[str], batch: int, device: str) -> Measured:
    """Return what a step with micro-batches of ``batch`` samples takes, measured in a process of its own.

    Raises:
        ValueError: if the process fails, out of memory for one.
    """
    command = [sys.executable, "-m", "agssd", "plan", *of_fit, "--rehearse", str(batch), "--device", device]
    done = subprocess.run(command, env=os.environ | _GLIBC, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"--measure: a step with {batch} sample(s) per micro-batch failed: {reason}")
    return Measured(**json.loads(lines[-1]))


def measure_here(build: Callable[[], PretrainModule], step: Step, parents: ParentBatch, device: str) -> Measured:
    """Take real steps and return their peak and time; for a process that does nothing else.

    Args:
        build: returns a new model to which nothing else refers.
        step: how a step is taken.
        parents: micro-batch of parent crops.
        device: "cpu" or "cuda".
    """
    micro_batches = min(step.accumulate, 2)  # of each rehearsed step

    def run(parents: ParentBatch, steps: int) -> float:
        """Return the seconds of the quickest step, per micro-batch."""
        model = build().to(device)
        set_stage(model, step)
        starts: list[float] = []

        def views() -> object:
            moved = {name: part.to(device, copy=True) for name, part in cast(dict[str, Tensor], parents).items()}
            return model.on_after_batch_transfer(moved, 0)

        def at(stage: Stage) -> None:
            if stage == "views":
                starts.append(_now(device))

        rehearse(model, step, views, at, steps)
        ends = [*starts[::micro_batches], _now(device)]
        return min(after - before for before, after in zip(ends[:-1], ends[1:], strict=True)) / micro_batches

    run(parents, 2)
    _give_back()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        seconds = run(parents, _TIMED)
        return Measured(torch.cuda.max_memory_allocated(), seconds)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    seconds = run(parents, _TIMED)
    return Measured(_resident("VmHWM") - before, seconds)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _give_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    ctypes.CDLL(None).malloc_trim(0)


def _resident(name: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes.

    Raises:
        ValueError: where the system has no such figure.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration) as error:
        raise ValueError("--measure on a CPU reads /proc/self/status, which only Linux has") from error
