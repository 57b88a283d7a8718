"""Runs `agssd fit` in forked processes and kills them where it is told; started by the tests of this folder.

``stage.py`` reads one job per line as JSON (see :func:`perform`) and answers each with one line. It imports everything
once, so that a hundred runs do not cost a hundred imports; what is forked and killed is a real process all the same.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

import agssd.lightning_cli
import agssd.methods.agssd
import agssd.models.vit  # noqa: F401  (before any fork)
from agssd.callbacks.view_panels import ViewPanels
from agssd.cli import main
from agssd.methods.base import PretrainModule


def die() -> None:
    """End this process as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before_teacher(step: int) -> None:
    """Die between the optimiser step ``step`` and the teacher's update."""
    update = PretrainModule.update_teacher

    def stand_in(self: PretrainModule, momentum: float) -> None:
        if self.trainer.global_step == step:
            die()
        update(self, momentum)

    PretrainModule.update_teacher = stand_in  # type: ignore[method-assign]


def kill_between_micro_batches(step: int, batch: int) -> None:
    """Die in the backward pass of micro-batch ``batch`` of the step after ``step``."""
    backward, seen = PretrainModule.on_after_backward, [0]

    def stand_in(self: PretrainModule) -> None:
        seen[0] += self.trainer.global_step == step
        if seen[0] == batch:
            die()
        backward(self)

    PretrainModule.on_after_backward = stand_in  # type: ignore[method-assign]


def kill_inside_save(event: int) -> None:
    """Die at the ``event``-th moment of the writing of checkpoints: before each call that changes the disk.

    Half of a file counts as a moment of its own. Calls are counted in the thread that writes alone.
    """
    seen = [0]

    def moment() -> bool:
        if not threading.current_thread().name.startswith("checkpoint"):
            return False
        seen[0] += 1
        return seen[0] > event

    def watch(place: Any, name: str) -> None:
        call: Callable[..., Any] = getattr(place, name)

        def stand_in(*given: Any, **named: Any) -> Any:
            if moment():
                die()
            return call(*given, **named)

        setattr(place, name, stand_in)

    for name in ("fsync", "replace", "link", "unlink", "remove"):
        watch(os, name)
    save = torch.save

    def half(checkpoint: Any, path: Any) -> None:
        if moment():
            memory = io.BytesIO()
            save(checkpoint, memory)
            Path(path).write_bytes(memory.getvalue()[: len(memory.getvalue()) // 2])
            die()
        save(checkpoint, path)

    torch.save = half


PLACES: dict[str, Callable[..., None]] = {
    "teacher": kill_before_teacher,
    "micro-batch": kill_between_micro_batches,
    "save": kill_inside_save,
}


def announce_first_step(pipe: int) -> None:
    """Write a byte to ``pipe`` after the first optimiser step."""
    step = PretrainModule.optimizer_step

    def stand_in(self: PretrainModule, *given: Any, **named: Any) -> None:
        step(self, *given, **named)
        os.write(pipe, b".")
        PretrainModule.optimizer_step = step  # type: ignore[method-assign]

    PretrainModule.optimizer_step = stand_in  # type: ignore[method-assign]


def perform(job: dict[str, Any]) -> dict[str, Any]:
    """Run ``agssd`` on ``ranks`` processes; return exit codes, negative for a signal, and seconds after the first step.

    ``kill`` is ``[place, rank, ...]`` of :data:`PLACES`, or ``["time", seconds]`` after the first step, or absent.
    Where one rank has died the others are killed too, as a job is.
    """
    where, ranks = job.get("kill"), job["ranks"]
    heard, told = os.pipe()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {}
    for rank in range(ranks):
        child = os.fork()
        if child:
            children[child] = rank
            continue
        try:
            os.close(heard)
            log = os.open(f"{job['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if ranks > 1:
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
                os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": str(rank)}
            rank_zero_only.rank = rank  # as where each process imports Lightning for itself
            ViewPanels._draw = lambda *given: None  # type: ignore[method-assign]
            announce_first_step(told)
            if where and where[0] in PLACES and where[1] == rank:
                PLACES[where[0]](*where[2:])
            code = main(job["arguments"])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            os._exit(70)
    os.close(told)
    for _ in range(ranks):
        os.read(heard, 1)  # nothing where all have ended
    began = time.perf_counter()
    if where and where[0] == "time":
        time.sleep(where[1])
        for child in children:
            os.kill(child, signal.SIGKILL)
    codes = [0] * ranks
    while children:
        child, status = os.wait()
        codes[children.pop(child)] = code = os.waitstatus_to_exitcode(status)
        if code:
            for other in children:
                os.kill(other, signal.SIGKILL)
    os.close(heard)
    return {"codes": codes, "seconds": time.perf_counter() - began}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(perform(json.loads(line))), flush=True)
