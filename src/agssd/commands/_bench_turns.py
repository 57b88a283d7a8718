"""Two trainings of one process that take their steps in turn, and a clock of what happens inside a step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Semaphore, Thread
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import Profiler


class Turns(Callback):
    """Has a training, in a thread of its own, take its steps only when it is told to. A step is one micro-batch."""

    def __init__(self) -> None:
        self._go, self._paused = Semaphore(0), Semaphore(0)
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._ending = self._ended = False
        self._steps = 0  # left of this turn
        self._began = self._took = (0.0, 0.0)
        self._batches: list[Any] = []  # of the step under way

    def begin(self, fit: Callable[[], object]) -> None:
        """Start ``fit`` and wait until its first step could be taken."""
        self._thread = Thread(target=self._run, args=(fit, torch.get_num_threads()), daemon=True, name="agssd-bench")
        self._thread.start()
        self._wait()

    def take(self, steps: int) -> tuple[float, float]:
        """Take so many steps; return the seconds they took and the CPU seconds of the training loop's thread.

        Raises:
            RuntimeError: if the training has ended.
        """
        self._steps = steps
        self._go.release()
        self._wait()
        return self._took

    def end(self) -> None:
        """Let the training end where it is."""
        if self._thread is not None:
            self._ending = True
            self._go.release()
            self._thread.join()
            self._thread = None

    def _wait(self) -> None:
        self._paused.acquire()
        if self._error is not None:
            raise self._error
        if self._ended:
            raise RuntimeError("the training has ended before its time")

    # ------------------------------------------------------ in the training's thread

    def _run(self, fit: Callable[[], object], threads: int) -> None:
        try:
            torch.set_num_threads(threads)  # each thread has its own
            fit()
        except BaseException as error:  # for who waits
            self._error = error
        finally:
            self._ended = True
            self._paused.release()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the first turn."""
        self._pause(trainer, pl_module.device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Hold the batch till the next: freeing it, which every training does, is no hook's cost."""
        self._batches = list(getattr(pl_module, "parents", None) or [])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Wait for the next turn after the last step of this one."""
        self._steps -= 1
        if self._steps == 0:
            self._pause(trainer, pl_module.device)

    def _pause(self, trainer: pl.Trainer, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds, cpu_s = _clocks()
        self._took = seconds - self._began[0], cpu_s - self._began[1]
        self._paused.release()
        self._go.acquire()
        trainer.should_stop = self._ending
        self._began = _clocks()


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()


class HookClock(Profiler):
    """Adds up the CPU time that a training loop's thread spends in the hooks of some callbacks, by their class.

    It is a trainer's profiler, since Lightning names every hook to that. What a hook calls counts for the hook.

    Args:
        callbacks: whose hooks count.
    """

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        super().__init__()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.training_steps: list[float] = []  # CPU seconds of each ``training_step``
        self._prefixes = {f"[Callback]{callback.state_key}.": type(callback).__name__ for callback in callbacks}
        self._owners: dict[str, str | None] = {}  # by action
        self._depth = 0
        self._began = self._step_began = 0.0

    def start(self, action_name: str) -> None:
        """Begin to count, if the action is one of the hooks."""
        if self._owner(action_name) is not None:
            self._enter()
        elif action_name.endswith("Strategy.training_step"):
            self._step_began = time.thread_time()

    def stop(self, action_name: str) -> None:
        """Add the action up."""
        owner = self._owner(action_name)
        if owner is not None:
            self._leave(owner)
        elif action_name.endswith("Strategy.training_step"):
            self.training_steps.append(time.thread_time() - self._step_began)

    @contextmanager
    def counting(self, name: str) -> Iterator[None]:
        """Count what happens inside as ``name``, unless it is part of something that counts."""
        self._enter()
        try:
            yield
        finally:
            self._leave(name)

    def _owner(self, action: str) -> str | None:
        if action not in self._owners:
            found = (name for prefix, name in self._prefixes.items() if action.startswith(prefix))
            self._owners[action] = next(found, None)
        return self._owners[action]

    def _enter(self) -> None:
        if self._depth == 0:
            self._began = time.thread_time()
        self._depth += 1

    def _leave(self, name: str) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds[name] += time.thread_time() - self._began
