"""What watching costs: the steps of a training that is watched as by ``agssd fit``, beside those of a bare one."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from agssd.callbacks.collapse_monitor import CollapseMonitor
from agssd.callbacks.ema_teacher import EMATeacher
from agssd.callbacks.every_run import STANDING
from agssd.callbacks.mask_ratio import MaskRatioSchedule
from agssd.callbacks.online_probe import OnlineProbe
from agssd.callbacks.preemption import Preemption
from agssd.callbacks.progress import Progress
from agssd.callbacks.run_checkpoint import RunCheckpoint
from agssd.commands._bench_probe import bench_trainer, quiet, write_cache
from agssd.commands._bench_turns import HookClock, Turns
from agssd.data_modules.pretrain import PretrainDataModule
from agssd.methods.dino import DINO
from agssd.models.step_guard import NoStepGuard, StepGuard
from agssd.models.vit import ViT
from agssd.run.metrics_file import RunCSVLogger
from agssd.run.wandb import QuietWandbLogger
from agssd.transforms.crops import OverlapCrops

_NEEDED = (EMATeacher, MaskRatioSchedule)  # by the training itself
_WARM_UP = 20  # steps that do not count: they fill caches, and a run draws its first picture
_TURN = 10  # steps of one side before the other's turn
_REST_S = 30.0  # in which neither trains, the rhythm of the slowest thread
_LOG_EVERY = 50  # Lightning's default and that of conf/trainer/base.yaml


@dataclass
class Monitoring:
    """What was measured."""

    pairs: list[tuple[float, float]]  # of each round: seconds of a step, watched and bare
    cpu_pairs: list[tuple[float, float]]  # the same in CPU seconds of the training loop
    shares: dict[str, float]  # CPU time of each part that watches, in % of that of a bare step


@dataclass
class Side:
    """One of the two trainings."""

    trainer: Any
    module: DINO
    data: PretrainDataModule
    turns: Turns


def rhythm() -> int:
    """Return the least number of steps in which everything that watches comes up as often as in a long run."""
    every = (getattr(callback, "every_n_steps", 1) for callback in _watching(1))
    return math.lcm(_LOG_EVERY, *every)


def time_monitoring(rounds: int, device: Any, folder: Path, steps: int | None = None) -> Monitoring:
    """Let a watched and a bare training take turns, and measure the steps of both and what watching does within one.

    DINO at the size of conf/experiment/small.yaml, 16 samples per step, gradients clipped, from the same weights with
    the same samples. Watched is what ``agssd fit`` has by default in the log of a job: the standing callbacks, step
    guard, lines of progress, ``metrics.csv``, W&B; checkpoint and preemption stand by. Not in it is what has rows of
    its own, probe and saves. W&B is offline, as without an account, so that nothing leaves this machine; its own
    process, which works beside both trainings, is in no CPU time. Bare is Lightning with the recipe and its schedules.

    Lines and signs of life come by the wall clock, which runs on in the other's turn: twice as often as they are due.
    The threads of watchdog and life sign run in both sides' turns, so they are only in the CPU time, taken while both
    trainings rest. The rest of the CPU time is that of the training loop's thread: in hooks, guard and log, and in the
    steps that measure the gradient of each term, beyond the median of the others.

    Args:
        rounds: how many. In each, both trainings are begun anew twice, either of them first: the one that was begun
            first takes a percent or two longer for its steps (on a CPU, with two bare ones too), whichever it is.
        device: torch device.
        folder: for the cache of simulated volumes and both runs.
        steps: of each side in a round; by default one :func:`rhythm`.
    """
    steps = rhythm() if steps is None else steps
    cache = folder / "monitoring.h5"
    write_cache(cache)
    found = Monitoring([], [], {})
    spent: defaultdict[str, float] = defaultdict(float)
    with quiet(), (folder / "monitoring.log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        for number in range(rounds):
            took = [(0.0, 0.0), (0.0, 0.0)]
            for first in (0, 1):
                clock, watched, bare = sides(device, cache, folder / f"round{number}_{first}", _WARM_UP + steps)
                with _running(*((bare, watched) if first else (watched, bare))):
                    clock.seconds.clear()
                    turns = _round(watched, bare, steps)
                    resting = _cpu_at_rest()
                took = [_add(one, other) for one, other in zip(took, turns, strict=True)]
                for name, cpu_s in {**clock.seconds, "gradients of the terms": _measuring(clock)}.items():
                    spent[name] += cpu_s
                spent["threads"] += resting * turns[1][1]
            (watched_s, watched_cpu_s), (bare_s, bare_cpu_s) = took
            found.pairs.append((watched_s / (2 * steps), bare_s / (2 * steps)))
            found.cpu_pairs.append((watched_cpu_s / (2 * steps), bare_cpu_s / (2 * steps)))
    of_bare_s = 2 * steps * sum(bare_s for _, bare_s in found.cpu_pairs)
    found.shares = {name: 100 * value / of_bare_s for name, value in spent.items()}
    return found


@contextmanager
def _running(*both: Side) -> Iterator[None]:
    """Have the sides set up and warm, the first first, and end them."""
    try:
        for side in both:
            side.turns.begin(partial(side.trainer.fit, side.module, side.data))
            side.turns.take(_WARM_UP)
        yield
    finally:
        for side in both:
            side.turns.end()
            for logger in side.trainer.loggers:
                if isinstance(logger, QuietWandbLogger):
                    logger.interrupt()  # ends W&B's process, which would write into the folder till then


def sides(device: Any, cache: Path, folder: Path, max_steps: int) -> tuple[HookClock, Side, Side]:
    """Return the clock of what watches, the training that is watched, and the bare one."""
    watching = _watching(max_steps)
    clock = HookClock(watching)
    watched = _side(
        device,
        cache,
        callbacks=watching,
        guard=_ClockedGuard(clock),
        profiler=clock,
        max_steps=max_steps,
        logger=[_ClockedCSV(folder / "watched", clock), _ClockedWandb(folder / "watched", clock)],
        log_every_n_steps=_LOG_EVERY,
        enable_progress_bar=True,
        default_root_dir=folder / "watched",
    )
    bare = _side(
        device,
        cache,
        callbacks=[],
        guard=NoStepGuard(),
        profiler=HookClock(),
        max_steps=max_steps,
        enable_checkpointing=False,
        default_root_dir=folder / "bare",
    )
    return clock, watched, bare


def _watching(max_steps: int) -> list[Callback]:
    """Return everything that stands in a run and that a training does not need, at its defaults."""
    standing = [kind() for kind in STANDING.values() if kind not in (*_NEEDED, OnlineProbe)]
    progress = Progress("lines").callback()
    assert progress is not None
    return [*standing, RunCheckpoint(every_n_train_steps=max_steps + 1), Preemption(), progress]


def _side(device: Any, cache: Path, callbacks: list[Callback], guard: StepGuard, **settings: Any) -> Side:
    torch.manual_seed(0)
    module = DINO(
        ViT(1, 8, embed_dim=192, depth=4, num_heads=3),
        OverlapCrops(size_vox=(32, 32, 32), scale=(0.4, 0.9), num_local=0),
        num_prototypes=512,
        head_hidden=512,
        head_bottleneck=128,
    )
    module.guard = guard
    turns = Turns()
    needed = [kind() for kind in _NEEDED]
    trainer = bench_trainer(device, callbacks=[*needed, *callbacks, turns], gradient_clip_val=3.0, **settings)
    return Side(trainer, module, PretrainDataModule(str(cache), (40, 56, 40), 16, num_workers=2), turns)


def _round(watched: Side, bare: Side, steps: int) -> list[tuple[float, float]]:
    """Return seconds and CPU seconds of ``steps`` steps of each side."""
    took = [(0.0, 0.0), (0.0, 0.0)]
    for number, start in enumerate(range(0, steps, _TURN)):
        for which in (0, 1) if number % 2 else (1, 0):
            seconds, cpu_s = (watched, bare)[which].turns.take(min(_TURN, steps - start))
            took[which] = _add(took[which], (seconds, cpu_s))
    return took


def _add(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return one[0] + other[0], one[1] + other[1]


def _measuring(clock: HookClock) -> float:
    """Return the CPU seconds of measuring gradients: of those training steps, beyond the median of the others."""
    every = CollapseMonitor().every_n_steps
    counted = list(enumerate(clock.training_steps, start=1))[_WARM_UP:]
    measured = [seconds for number, seconds in counted if number % every == 0]
    others = [seconds for number, seconds in counted if number % every]
    return sum(measured) - len(measured) * median(others)


def _cpu_at_rest() -> float:
    """Return the share of one processor that this process takes while no training does."""
    began, cpu_s = time.perf_counter(), time.process_time()
    time.sleep(_REST_S)
    return (time.process_time() - cpu_s) / (time.perf_counter() - began)


class _ClockedGuard(StepGuard):
    """The step guard, whose CPU time counts."""

    def __init__(self, clock: HookClock) -> None:
        super().__init__()
        self._clock = clock

    def observe(self, local: Tensor, reduced: Tensor) -> Tensor:
        with self._clock.counting("step guard"):
            return super().observe(local, reduced)

    def judge(self, optimizer: torch.optim.Optimizer) -> Tensor | None:
        with self._clock.counting("step guard"):
            return super().judge(optimizer)

    @contextmanager
    def keeping(self, module: nn.Module) -> Iterator[None]:
        with self._clock.counting("step guard"):
            kept = super().keeping(module)
            kept.__enter__()
        yield
        with self._clock.counting("step guard"):
            kept.__exit__(None, None, None)


class _ClockedCSV(RunCSVLogger):
    """``metrics.csv``, whose CPU time counts where no hook writes it."""

    def __init__(self, directory: Path, clock: HookClock) -> None:
        super().__init__(directory)
        self._clock = clock

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        with self._clock.counting("metrics.csv"):
            super().log_metrics(metrics, step)

    def save(self) -> None:
        with self._clock.counting("metrics.csv"):
            super().save()


class _ClockedWandb(QuietWandbLogger):
    """W&B, offline, whose CPU time counts where no hook sends to it; pictures count for the hook that draws them."""

    def __init__(self, directory: Path, clock: HookClock) -> None:
        super().__init__(directory, "agssd", None, directory.name, online=False)
        self._clock = clock

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        with self._clock.counting("W&B"):
            super().log_metrics(metrics, step)
