"""Tasks in processes of their own, some side by side: one that dies or fails leaves the others be."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Any, cast

Task = tuple[Callable[..., dict[str, Any]], *tuple[Any, ...]]  # a function and what it is given


def side_by_side(tasks: Mapping[str, Task], workers: int, preload: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Do tasks, ``workers`` at a time, say how each ended, and return names and reasons of those that failed.

    Each sees one GPU, where there are any; of several each is given to as many workers as the others.

    When this process is interrupted, also by a terminal, which interrupts its tasks too, those that run are told to end
    by SIGTERM alone, upon which a training saves itself, and waited for; when it is killed, they end themselves.

    Args:
        tasks: by name; a result has "value" or "seconds".
        workers: processes.
        preload: modules that are imported once, not once a task.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    failed, began, waiting = [], time.monotonic(), list(tasks.items())
    running: dict[Connection, tuple[str, Any, int]] = {}
    free = list(range(workers))[::-1]
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                (name, task), slot = waiting.pop(0), free.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_do, args=(sender, device_of(slot), *task))
                process.start()
                sender.close()  # this process's end, or the death of the task would not be seen
                running[receiver] = name, process, slot
            for ended in wait(list(running)):
                receiver = cast(Connection, ended)
                name, process, slot = running.pop(receiver)
                free.append(slot)
                row, reason = _result(receiver, process)
                if reason:
                    failed.append((name, reason))
                told = f"failed: {reason}" if reason else _told(row)
                done, minutes = len(tasks) - len(waiting) - len(running), (time.monotonic() - began) / 60
                print(f"[{done}/{len(tasks)}, {minutes:.1f} min] {name}: {told}", flush=True)
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.join()
    return failed


@contextmanager
def told_to_end() -> Iterator[list[int]]:
    """Let SIGTERM and SIGUSR1 interrupt what runs here as a terminal does, and yield which of them came, once one has.

    A second one while tasks save themselves is passed over.
    """
    told: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        told.append(number)
        if len(told) == 1:
            raise KeyboardInterrupt

    before = {one: signal.signal(one, interrupt) for one in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield told
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def device_of(slot: int) -> str | None:
    """Return what ``CUDA_VISIBLE_DEVICES`` is to be for the n-th of the processes side by side; None without a GPU."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        import torch

        visible = [str(number) for number in range(torch.cuda.device_count())]
    else:
        visible = [name.strip() for name in given.split(",") if name.strip()]
    return visible[slot % len(visible)] if visible else None


def _result(receiver: Connection, process: Any) -> tuple[dict[str, Any], str]:
    """Return the row of a task that has ended, and the reason if it failed."""
    try:
        row, reason = receiver.recv()
    except (EOFError, OSError):  # it has died, before its answer or within
        row, reason = {}, ""
    process.join()
    receiver.close()
    if not row and not reason:
        how = f"killed by signal {-process.exitcode}" if process.exitcode < 0 else f"exit code {process.exitcode}"
        reason = f"its process ended without a word ({how})"
        reason += "; the memory may be too small for so many at once" if process.exitcode == -signal.SIGKILL else ""
    return row, reason


def _told(row: Mapping[str, Any]) -> str:
    return f"{row['value']:.4f}" if "value" in row else f"{row.get('seconds', 0):.0f} s"


def _do(sender: Connection, device: str | None, work: Callable[..., dict[str, Any]], *given: Any) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    for one in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(one, signal.SIG_IGN)  # it is for the bench, which then sends SIGTERM
    Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        row, reason = work(*given), ""
    except (Exception, SystemExit) as error:
        row, reason = {}, str(error) or type(error).__name__
    sender.send((row, reason))


@contextmanager
def said_to(log: Path) -> Iterator[None]:
    """Let everything that this process says, libraries included, go to the end of a file."""
    with log.open("a", encoding="utf-8") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        kept = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(kept, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)


def _end_with_the_parent() -> None:
    """Have this process told to save itself and end when its parent is killed, or a second bench would meet it."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
