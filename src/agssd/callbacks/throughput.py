"""How fast the run is, and whether it waits for data."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import Profiler
from torch import Tensor

from agssd.callbacks.standing import StandingCallback, log_figures

_LOG = logging.getLogger(__name__)
_FETCH = "train_dataloader_next"  # how the action ends in which the loop asks for a batch


class StepClock:
    """Counts the time of optimiser steps, without pauses; waits for the device whenever it is read or stopped."""

    def __init__(self) -> None:
        self.running = False
        self._began = self._pause_began = 0.0
        self._step = 0

    def start(self, step: int, device: torch.device) -> None:
        """Begin anew after ``step`` optimiser steps."""
        _wait_for(device)
        self.running, self._began, self._step = True, time.perf_counter(), step

    def pause(self, device: torch.device) -> None:
        """Stop until :meth:`resume`."""
        _wait_for(device)
        self._pause_began = time.perf_counter()

    def resume(self) -> None:
        """Go on."""
        self._began += time.perf_counter() - self._pause_began

    def read(self, step: int, device: torch.device) -> tuple[float, int]:
        """Return seconds and optimiser steps since :meth:`start`."""
        _wait_for(device)
        return time.perf_counter() - self._began, step - self._step


@contextmanager
def outside_training(trainer: pl.Trainer, device: torch.device) -> Iterator[None]:
    """Keep the time spent inside out of the figures of every :class:`Throughput` of the run."""
    clocks = [callback.clock for callback in cast(Any, trainer).callbacks if isinstance(callback, Throughput)]
    for clock in clocks:
        clock.pause(device)
    try:
        yield
    finally:
        for clock in clocks:
            clock.resume()


class Throughput(StandingCallback):
    """Logs speed, data wait and memory every ``every_n_steps`` optimiser steps.

    Keys: ``throughput/samples_per_s`` over all ranks; ``throughput/s_per_step``; ``throughput/data_wait``, the share of
    the time that the slowest rank's training loop spent waiting for its data loader; ``throughput/peak_memory_gib`` of
    rank 0, device memory on CUDA and resident memory on a CPU. Validation and probes (``probe/seconds``) do not count,
    nor does the first step of a run, which compiles and fills caches.

    The device is waited for once per interval, so the figures are exact and the steps between stay asynchronous. Data
    wait is host time: on a GPU that still has work queued it is an upper bound of what was lost.

    Lightning's own ``ThroughputMonitor`` waits for the device in every step and does not see data wait.

    Args:
        every_n_steps: optimiser steps between figures.
        max_data_wait: share of the time above which one sentence says why the loop waits (too few workers, or a slow
            disk) and how many workers would do.
    """

    needs: ClassVar[type[Any]] = pl.LightningModule

    def __init__(self, every_n_steps: int = 50, max_data_wait: float = 0.03) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"throughput.every_n_steps is {every_n_steps}; it must be at least 1")
        self.every_n_steps = every_n_steps
        self.max_data_wait = max_data_wait
        self.clock = StepClock()
        self._fetches: _FetchClock | None = None
        self._step = 0
        self._warned = False
        self._workers_wanted = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to the time that Lightning's loop spends in the data loader."""
        owner = cast(Any, trainer)  # Lightning declares the attribute nowhere
        self._fetches = owner.profiler = _FetchClock(owner.profiler)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the trainer its own profiler back."""
        owner = cast(Any, trainer)
        if self._fetches is not None and owner.profiler is self._fetches:
            owner.profiler = self._fetches.inner
        self._fetches = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget an earlier fit."""
        self._step = trainer.global_step
        self.clock.running = False
        self._warned = False

    def on_step_restored(self, step: int) -> None:
        """Begin a new interval."""
        super().on_step_restored(step)
        self.clock.running = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self.clock.pause(pl_module.device)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock again."""
        self.clock.resume()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the interval that ends with this batch, if one does."""
        if not self.active or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if not self.clock.running:
            self._restart(pl_module.device)
        elif self._step % self.every_n_steps == 0:
            self._report(trainer, pl_module, batch)
            self._restart(pl_module.device)

    def _restart(self, device: torch.device) -> None:
        self.clock.start(self._step, device)
        self._workers_wanted = _processor_seconds() or 0.0
        if self._fetches is not None:
            self._fetches.waited = 0.0

    def _report(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> None:
        assert self._fetches is not None
        seconds, steps = self.clock.read(self._step, module.device)
        shares = module.all_gather(torch.tensor(self._fetches.waited / seconds, device=module.device))
        assert isinstance(shares, Tensor)
        wait = float(shares.max())
        figures = {"s_per_step": seconds / steps, "data_wait": wait, "peak_memory_gib": _peak_memory_gib(module.device)}
        if samples := _samples_per_step(trainer, batch):
            figures["samples_per_s"] = samples * steps / seconds
        log_figures(trainer, {f"throughput/{name}": value for name, value in figures.items()})
        if wait > self.max_data_wait and not self._warned and trainer.is_global_zero:
            self._warned = True
            workers = getattr(trainer.train_dataloader, "num_workers", None)
            wanted = _processor_seconds()
            busy = None if wanted is None or not workers else (wanted - self._workers_wanted) / (workers * seconds)
            _LOG.warning(
                "step %d: %.0f %% of the last %d steps (%.2f of %.2f s each) went by waiting for data, more than "
                "%.0f %%; %s",
                *(self._step, 100 * wait, steps, wait * seconds / steps, seconds / steps, 100 * self.max_data_wait),
                _remedy(wait, workers, busy, _processors()),
            )


def _remedy(wait: float, workers: int | None, busy: float | None, processors: int) -> str:
    """Return why the loop waits and what helps, as the end of a sentence.

    While the loop waits every worker is at work, so ``workers`` of them deliver one step's data in the time of a step,
    and ``workers / (1 - wait)`` would deliver it in the time that the step takes without waiting.

    Args:
        wait: share of the time spent waiting for data, in (0, 1].
        workers: of the loader; 0 where the training process reads, None where nobody knows.
        busy: share of their time for which the workers had a processor or wanted one; None where it is not known.
        processors: that this process may use.
    """
    if workers is None:
        return "raise the number of workers of the data module, or put the cache on a local disk"
    if workers == 0:
        needed = max(1, math.ceil(wait / max(1 - wait, 0.01)))
        return f"the training process reads by itself: set data.num_workers to about {needed}"
    needed = max(workers + 1, math.ceil(workers / max(1 - wait, 0.01)))
    if busy is not None and busy < 0.5:
        return (
            f"the {workers} worker(s) were at work {100 * busy:.0f} % of the time and waited for the disk else: "
            "put the cache on a local disk, or on a machine whose memory holds it"
        )
    known = "" if busy is None else f", which were at work {min(100 * busy, 100):.0f} % of the time"
    if needed <= processors:
        return f"the {workers} worker(s){known}, are too few: set data.num_workers to about {needed}"
    return (
        f"about {needed} workers instead of {workers}{known}, would keep up, but this process may use {processors} "
        "processor(s): ask for more, or prepare the cache with `--layout contiguous`, which needs no decoding"
    )


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor_seconds() -> float | None:
    """Return the seconds for which child processes had a processor or stood in line for one; None without Linux."""
    total = 0
    try:
        for child in multiprocessing.active_children():
            for task in Path(f"/proc/{child.pid}/task").iterdir():
                running, waiting, _ = (task / "schedstat").read_text().split()
                total += int(running) + int(waiting)
    except (OSError, ValueError):  # another system, or a worker that ended
        return None
    return total / 1e9


class _FetchClock(Profiler):
    """Passes everything on to the trainer's profiler and sums up the time in ``train_dataloader_next``.

    That is the one place where Lightning tells how long the loop was blocked by the loader: ``on_train_batch_start``
    comes after the transfer to the device, and so after the views were made.
    """

    def __init__(self, inner: Profiler) -> None:
        super().__init__()
        self.inner = inner
        self.waited = 0.0
        self._began = 0.0

    def profile(self, action_name: str) -> Any:
        """Keep out of the way of every other action: there are hundreds in a step."""
        if action_name.endswith(_FETCH):
            return super().profile(action_name)
        return self.inner.profile(action_name)

    def start(self, action_name: str) -> None:
        self.inner.start(action_name)
        if action_name.endswith(_FETCH):
            self._began = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith(_FETCH):
            self.waited += time.perf_counter() - self._began
        self.inner.stop(action_name)

    def summary(self) -> str:
        return self.inner.summary()

    def describe(self) -> None:
        self.inner.describe()

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | Path | None = None) -> None:
        self.inner.setup(stage, local_rank, None if log_dir is None else str(log_dir))

    def teardown(self, stage: str | None) -> None:
        self.inner.teardown(stage)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def _samples_per_step(trainer: pl.Trainer, batch: Any) -> int:
    """Return samples per optimiser step over all ranks: what the data module states, else counted in the batch."""
    stated = getattr(getattr(trainer, "datamodule", None), "global_batch_size", None)
    if isinstance(stated, int):
        return stated
    return _batch_size(batch) * trainer.accumulate_grad_batches * trainer.world_size


def _batch_size(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 0
    if isinstance(batch, Mapping):
        return _batch_size(batch["sample"]) if "sample" in batch else max(map(_batch_size, batch.values()), default=0)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return _batch_size(batch[0]) if batch else 0
    return 0
