"""A rank that dies or hangs ends the whole job within a stated time, and the cause is named."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from typing import Any, ClassVar, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from torch._C._distributed_c10d import PrefixStore, TCPStore

from agssd.callbacks.actions import record_action
from agssd.callbacks.life_sign import LifeSign
from agssd.callbacks.preemption import Preempted
from agssd.callbacks.standing import StandingCallback

_LOG = logging.getLogger(__name__)
EXIT_STALLED = 75  # of a process that the watchdog ends: temporary failure, worth another start
_FAILURE = "failure"
_WRITES_S = 5.0  # for the last words of rank 0: the disk may be what hangs
_GONE = -1  # the last beat of a rank that has come to its end
# What the training loop does, in its order; what comes first holds the others up.
_READING, _COMPUTING, _GRADIENTS, _ENDING = (
    "reading data, or reporting",
    "computing a step",
    "computing gradients",
    "ending a step",
)
_COLLECTIVE = (os.path.join("torch", "distributed"), os.path.join("torch", "nn", "parallel"))  # files of torch
_ORDER = ("starting", _READING, _COMPUTING, _GRADIENTS, _ENDING, "saving a checkpoint", "validating", "ending the run")


class Watchdog(StandingCallback):
    """Ends the job, naming the cause, when a rank dies, fails, or makes no progress.

    A thread of each rank tells the others through the job's rendezvous store, every ``beat_s``, that the rank lives,
    what its training loop does and since when; rank 0 looks at all of them, the others at rank 0. The job ends

    - where a rank has failed: the others learn of it a beat later, wait ``grace_s`` for an exception of their own,
      which they would meet in the next collective, and then go, with the failure of that rank as the cause;
    - ``lost_s`` after the last sign of life of a rank: killed, stopped, or its machine is gone;
    - ``stalled_s`` after the last progress of a training loop: a hanging disk, data loader or collective. The ranks
      whose loop is furthest behind are named, and the stacks of all threads are written to stderr.

    These are the times of rank 0, which may look up to two beats later. The others follow within two beats, ``grace_s``
    and 5 s, in which rank 0 may still say what it knows: with the defaults at most 160 s after the last sign of life of
    a lost rank and 30 s after a failure. A rank that meets an exception of its own in that time takes up to ``grace_s``
    and three beats to learn the cause (50 s); where its way out hangs, faulthandler ends it ``grace_s`` + ``lost_s``
    later. Where a link is cut, the side without rank 0 goes within ``lost_s`` + ``grace_s``, a beat and 5 s (145 s).

    Progress is the start or end of a batch, of a validation batch, and of a checkpoint. Where not even the thread comes
    to run, since native code holds the interpreter, faulthandler ends the process a ``lost_s`` later.

    Rank 0 leaves the cause in ``actions.jsonl`` and ``state.json``, if the disk takes it within 5 s, and unless a
    launcher, which saw a rank end, has killed it before.

    A rank that has finished, or has saved itself because it was told to stop, says so and is not waited for: the others
    may take their time to write and to close.

    A process that is ended so exits with 75, one that hangs in a call that does not return to Python with 1. Processes
    that Lightning has started on this machine are killed with it, stopped ones too; torchrun (30 s later for a stopped
    one) and SLURM (``--kill-on-bad-exit=1``) do the same for theirs. The strategy's ``timeout`` bounds single
    collectives besides and may stay at its default.

    Args:
        stalled_s: seconds without progress after which the job ends; longer than the slowest validation or probe, the
            compilation of the first step and the longest suspension of the job. 0 switches the watchdog off.
        lost_s: seconds without a sign of life after which a rank counts as lost.
        grace_s: seconds that ranks have to end by themselves once another has failed.
        beat_s: seconds between two signs of life.
    """

    needs: ClassVar[type[Any]] = pl.LightningModule

    def __init__(
        self, stalled_s: float = 1800.0, lost_s: float = 120.0, grace_s: float = 15.0, beat_s: float = 5.0
    ) -> None:
        super().__init__()
        for name, value in (("stalled_s", stalled_s), ("lost_s", lost_s), ("grace_s", grace_s), ("beat_s", beat_s)):
            if value < 0 or (value == 0 and name in ("lost_s", "beat_s")):
                raise ValueError(f"watchdog.{name} is {value}; give a positive number of seconds")
        if stalled_s and (lost_s < 2 * beat_s or stalled_s < 2 * beat_s):
            raise ValueError(
                f"watchdog.beat_s is {beat_s}, more than half of lost_s {lost_s} or stalled_s {stalled_s}; signs of "
                "life would come too late"
            )
        self.stalled_s, self.lost_s, self.grace_s, self.beat_s = stalled_s, lost_s, grace_s, beat_s
        self._thread: _Watch | None = None
        self._progress = (time.monotonic(), 0, "starting")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to watch."""
        if not self.active or not self.stalled_s:
            return
        self._note(trainer, "starting")
        self._thread = _Watch(self, trainer)
        self._thread.start()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop watching."""
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tell the other ranks why this one ends; say why, if it only ends because another has.

        A run that was told to stop has not failed: all of its ranks leave alike, and may have to wait for the disk.
        """
        if isinstance(exception, Preempted):
            self._stop()
            return
        if self._thread is not None:
            self._thread.failed(exception)
        self._stop()
        if self.active and self.stalled_s and trainer.world_size > 1:  # should the way out hang
            limit = self.grace_s + self.lost_s
            faulthandler.dump_traceback_later(limit, exit=True, file=cast(Any, sys.__stderr__))

    def _stop(self) -> None:
        if self._thread is not None:
            self._thread.end()
            self._thread = None

    def resumed(self, now: float) -> None:
        """Count progress from ``now``: the process was suspended."""
        self._progress = (now, *self._progress[1:])

    def progress(self) -> tuple[float, int, str]:
        """Return when the training loop last came by (time.monotonic), at which step, and what it began then."""
        return self._progress

    def _note(self, trainer: pl.Trainer, what: str) -> None:
        self._progress = (time.monotonic(), trainer.global_step, what)

    # what the loop passes, and what it begins there

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note progress."""
        self._note(trainer, _COMPUTING)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Note progress."""
        self._note(trainer, _GRADIENTS)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note progress."""
        self._note(trainer, _ENDING)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note progress."""
        self._note(trainer, _READING)

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Note progress."""
        self._note(trainer, "validating")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note progress."""
        self._note(trainer, _READING)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Note progress."""
        self._note(trainer, "saving a checkpoint")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note progress."""
        self._note(trainer, "ending the run")


class _Watch(threading.Thread):
    """The thread of one rank; see :class:`Watchdog`."""

    def __init__(self, owner: Watchdog, trainer: pl.Trainer) -> None:
        super().__init__(daemon=True, name="agssd-watchdog")
        self.owner, self.rank, self.world_size = owner, trainer.global_rank, trainer.world_size
        self._trainer = trainer
        self._children, self._parent = _launched(trainer)
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._store = None
        if self.world_size > 1:
            self._store = PrefixStore(f"agssd/{_life()}", _connect(owner.lost_s))
        self._beat = 0
        self._seen: dict[int, tuple[int, float]] = {}  # per rank: number of its last beat, and when it was seen first

    def run(self) -> None:
        """Beat and look until the run ends."""
        beat_s = self.owner.beat_s
        last = time.monotonic()
        while not self._ended.wait(beat_s):
            now = time.monotonic()
            if now - last > max(5 * beat_s, 0.5 * self.owner.lost_s):
                self._seen.clear()  # this process was stopped, and others may have been too: a new start for all
                self.owner.resumed(now)
            self._arm()
            cause = self._look_in_time(now)
            if cause:
                self._kill(cause)
            last = time.monotonic()
        self._say_goodbye()

    def end(self) -> None:
        """Stop; the run is over."""
        with self._lock:
            self._ended.set()
            faulthandler.cancel_dump_traceback_later()
        self.join(self.owner.beat_s)

    def _say_goodbye(self) -> None:
        """Tell the others not to wait for signs of life."""
        if self._store is not None:
            with suppress(Exception):  # of the store, which goes with rank 0
                self._store.set(str(self.rank), json.dumps({"beat": _GONE, **self._own()}))

    def failed(self, error: BaseException) -> None:
        """Tell the others, unless another rank was first, and then say so."""
        if self._store is None:
            return
        text = f"rank {self.rank} ({_place()}) failed at step {self.owner.progress()[1]}: {_brief(error)}"
        answer: list[str] = []
        telling = threading.Thread(
            target=self._tell, args=(text, error, answer), daemon=True, name="agssd-watchdog-tell"
        )
        telling.start()
        telling.join(self.owner.grace_s + 3 * self.owner.beat_s)
        first = answer[0] if answer else f"rank 0 or its machine does not answer any more; {text}"
        if first != text:
            _LOG.error("rank %d of %d ends because of another: %s", self.rank, self.world_size, first)
            self._put_down(first)

    def _tell(self, text: str, error: BaseException, answer: list[str]) -> None:
        """Append to ``answer`` what is known to have failed first; nothing where the store is gone with rank 0."""
        assert self._store is not None
        with suppress(Exception):  # of the store, whose classes of errors differ by version
            first = bytes(self._store.compare_set(_FAILURE, "", text)).decode()
            answer.append((self._who_is_gone() if first == text and _is_of_peer(error) else "") or first)

    # ------------------------------------------------------------- the look

    def _look_in_time(self, now: float) -> str:
        """Return what :meth:`_look` says; a store that does not answer is lost like a rank."""
        answer: list[str | Exception] = []

        def look() -> None:
            try:
                answer.append(self._look(now))
            except Exception as error:  # of the store, whose classes of errors differ by version
                answer.append(error)

        asking = threading.Thread(target=look, daemon=True, name="agssd-watchdog-look")
        asking.start()
        asking.join(self.owner.lost_s + self.owner.grace_s)
        said = answer[0] if answer else TimeoutError(f"no answer for {self.owner.lost_s + self.owner.grace_s:.0f} s")
        if isinstance(said, str):
            self._seen.pop(-1, None)
            return said
        return "" if self._ended.is_set() else self._without_store(now, said)

    def _look(self, now: float) -> str:
        """Tell the others of this rank, and return why the job must end, or nothing."""
        at, step, what = self.owner.progress()
        patience = 4 * self.owner.beat_s if self.rank else 0.0  # rank 0 sees all ranks and speaks first
        stalled = now - at > self.owner.stalled_s + patience
        if self._store is None:
            return f"no progress for {now - at:.0f} s ({what}, step {step})" if stalled else ""
        self._beat += 1
        self._store.set(str(self.rank), json.dumps({"beat": self._beat, **self._own()}))
        if self._store.check([_FAILURE]):
            text = self._store.get(_FAILURE).decode()
            if text and not self._ended.wait(self.owner.grace_s):
                return text
            return ""
        lost = self._lost(now)
        if not lost and stalled:
            lost = self._behind()
        if lost:
            return bytes(self._store.compare_set(_FAILURE, "", lost)).decode()
        return ""

    def _own(self) -> dict[str, Any]:
        """Return what this rank tells of itself."""
        since, step, what = self.owner.progress()
        at, waits = _main_thread()
        return {
            "since": time.monotonic() - since,
            "step": step,
            "what": what,
            "at": at,
            "waits": waits,
            "where": _place(),
        }

    def _others(self) -> dict[int, dict[str, Any]]:
        """Return what the watched ranks last told; those that have told nothing yet are left out."""
        assert self._store is not None
        ranks = range(self.world_size) if self.rank == 0 else (0,)
        known = [rank for rank in ranks if rank != self.rank and self._store.check([str(rank)])]
        return {rank: json.loads(self._store.get(str(rank))) for rank in known}

    def _lost(self, now: float) -> str:
        """Return which watched ranks have given no sign of life for too long."""
        gone = []
        for rank, told in self._others().items():
            number, since = self._seen.get(rank, (-1, now))
            if told["beat"] == _GONE:
                continue
            if told["beat"] != number:
                self._seen[rank] = (told["beat"], now)
            elif now - since > self.owner.lost_s:
                gone.append(f"rank {rank} ({told['where']}) gives no sign of life for {now - since:.0f} s; it was last "
                            f"seen {told['what']}, step {told['step']}")  # fmt: skip
        return "; ".join(gone)

    def _behind(self) -> str:
        """Return which ranks hold the others up: those that are furthest back, or all."""
        told = {self.rank: self._own()}
        if self.rank == 0:
            told |= self._others()
        place = {rank: (one["step"], one["waits"], _ORDER.index(one["what"])) for rank, one in told.items()}
        last = [(rank, told[rank]) for rank in told if place[rank] == min(place.values())]
        named = "; ".join(
            f"rank {rank} ({one['where']}) {one['what']}, step {one['step']}, at {one['at']}" for rank, one in last[:4]
        )
        return f"no progress for {told[self.rank]['since']:.0f} s; furthest behind: {named}"

    def _who_is_gone(self) -> str:
        """Return which rank is not there any more, where the error only says that a connection was closed."""
        time.sleep(0.5)  # a process that is being killed
        ended = [(rank, process.poll()) for rank, process in self._children.items()]
        gone = [f"rank {rank} was ended by {_signal(code)}" for rank, code in ended if code]
        if gone:
            return "; ".join(gone)
        before = {rank: told["beat"] for rank, told in self._others().items()}
        time.sleep(2.5 * self.owner.beat_s)
        gone = [
            f"rank {rank} ({told['where']}) is gone: no sign of life since step {told['step']}"
            for rank, told in self._others().items()
            if told["beat"] == before.get(rank) != _GONE
        ]
        return "; ".join(gone)

    def _without_store(self, now: float, error: Exception) -> str:
        """Return the cause once the store has not answered for ``lost_s``."""
        _, since = self._seen.setdefault(-1, (0, now))
        if time.monotonic() - since < min(self.owner.lost_s, self.owner.grace_s):
            return ""
        return f"rank 0 or its machine does not answer any more ({_brief(error)})"

    # ---------------------------------------------------------------- the end

    def _arm(self) -> None:
        """Have faulthandler end the process if this thread does not come by in time."""
        with self._lock:
            if not self._ended.is_set():
                faulthandler.dump_traceback_later(
                    self.owner.stalled_s + self.owner.lost_s, exit=True, file=cast(Any, sys.__stderr__)
                )

    def _kill(self, cause: str) -> None:
        """Say why, show where every thread is, and end this process and those that Lightning has started."""
        if self._ended.is_set():
            return
        print("agssd watchdog: where this rank is:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        said = f"agssd watchdog: rank {self.rank} of {self.world_size} ends the job: {cause}"
        print(said, file=sys.stderr, flush=True)  # last, where a log is read first
        if self.rank != 0:
            time.sleep(min(2 * self.owner.beat_s, 5.0))  # rank 0 knows most and may still say it
        self._put_down(cause)  # before Lightning's launcher ends this process because a child has ended
        for process in self._children.values():
            process.kill()
        if self._parent is not None and os.getppid() == self._parent:
            os.kill(self._parent, signal.SIGKILL)
        os._exit(EXIT_STALLED)

    def _put_down(self, cause: str) -> None:
        """Leave the cause in the run directory, on rank 0, without what an exception says: that may name a file."""
        if self.rank != 0:
            return
        cause = re.sub(
            r"( failed at step \d+: \w+): .*", r"\1; its message is in the terminal or the log of the job", cause
        )
        writing = threading.Thread(target=self._write, args=(cause,), daemon=True, name="agssd-watchdog-write")
        writing.start()
        writing.join(_WRITES_S)

    def _write(self, cause: str) -> None:
        for callback in cast(Any, self._trainer).callbacks:
            if isinstance(callback, LifeSign):
                callback.failed(self._trainer, cause)
        with suppress(OSError):
            record_action(self._trainer, "watchdog", reason=cause)


def _launched(trainer: pl.Trainer) -> tuple[dict[int, Any], int | None]:
    """Return the processes by rank, or the parent, of a job that Lightning itself has started on this machine."""
    processes = getattr(trainer.strategy.launcher, "procs", [])
    children = {trainer.global_rank + number: process for number, process in enumerate(processes, start=1)}
    environment = getattr(cast(Any, trainer.strategy), "cluster_environment", None)
    is_child = trainer.local_rank > 0 and isinstance(environment, LightningEnvironment)
    return children, os.getppid() if is_child else None


def _signal(code: int) -> str:
    """Return a process's exit code in words."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _connect(timeout_s: float) -> Any:
    """Return a connection of its own to the rendezvous store of the job."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, None, False, timedelta(seconds=timeout_s))


def _main_thread() -> tuple[str, bool]:
    """Return where the main thread is, as file, line and function, and whether it waits for other ranks there."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = traceback.extract_stack(frame, limit=30) if frame is not None else []
    if not stack:
        return "an unknown place", False
    waits = any(name in one.filename for one in stack[-2:] for name in _COLLECTIVE)  # DDP calls the step itself, too
    return f"{os.path.basename(stack[-1].filename)}:{stack[-1].lineno} {stack[-1].name}", waits


def _life() -> str:
    """Return what tells this start of the job from one before in the same store (torchrun restarts in place)."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _place() -> str:
    return f"{socket.gethostname()}, process {os.getpid()}"


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    said = [line for line in lines if line.strip()]
    return f"{type(error).__name__}: {(said or [''])[-1][:300]}"


def _is_of_peer(error: BaseException) -> bool:
    """Return whether an exception only says that another rank is not there."""
    text = str(error).lower()
    return any(word in text for word in ("connection closed by peer", "connection reset", "timed out", "broken pipe"))
