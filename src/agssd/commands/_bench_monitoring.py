"""What collapse monitor and step guard cost: steps with them beside steps without, in turn, in one run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agssd.commands._bench_probe import bench_trainer, quiet, write_cache

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from torch import Tensor

STEPS = 100  # of each half of a round: the default interval between two reports


class _NoGuard:
    """Takes every step as it comes."""

    withheld, on_device = None, False

    def observe(self, local: Tensor, reduced: Tensor) -> Tensor:
        """Do nothing."""
        return reduced

    def judge(self, *_: Any) -> None:
        """Do nothing."""

    @contextmanager
    def keeping(self, *_: Any) -> Iterator[None]:
        """Do nothing."""
        yield


def time_monitoring(rounds: int, device: Any, folder: Path) -> list[tuple[float, float]]:
    """Return per round the seconds of a step with the monitors and guards of a run, and without them.

    Switched are collapse monitor, step guard, and the reports of throughput and data stream. The watchdog, with its
    thread and hooks, and the clock of throughput run in both halves; loggers, life sign, panels and progress in
    neither. Their cost is not in the figure.

    DINO at the size of conf/experiment/small.yaml, 16 samples per step; all with their defaults. A half round is
    ``STEPS`` steps, among them one report and the micro-batches that it is made from.

    Args:
        rounds: how many, after one that does not count.
        device: torch device.
        folder: for the cache of simulated volumes.
    """
    from agssd.callbacks.collapse_monitor import CollapseMonitor
    from agssd.callbacks.data_stream import DataStream
    from agssd.callbacks.ema_teacher import EMATeacher
    from agssd.callbacks.non_finite import NonFinite
    from agssd.callbacks.throughput import Throughput
    from agssd.callbacks.watchdog import Watchdog
    from agssd.data_modules.pretrain import PretrainDataModule
    from agssd.methods.dino import DINO
    from agssd.models.vit import ViT
    from agssd.transforms.crops import OverlapCrops

    cache = folder / "monitoring.h5"
    write_cache(cache)
    pairs: list[tuple[float, float]] = []
    watching: list[Any] = [CollapseMonitor(every_n_steps=STEPS), NonFinite(), Throughput(), DataStream(), Watchdog()]
    with quiet():
        trainer = bench_trainer(
            device,
            max_steps=2 * (rounds + 1) * STEPS,
            callbacks=[EMATeacher(), *watching, _switch(watching, pairs, device)],
            default_root_dir=folder,
            enable_checkpointing=False,
        )
        module = DINO(
            ViT(1, 8, embed_dim=192, depth=4, num_heads=3),
            OverlapCrops(size_vox=(32, 32, 32), scale=(0.4, 0.9), num_local=0),
            num_prototypes=512,
            head_hidden=512,
            head_bottleneck=128,
        )
        trainer.fit(module, PretrainDataModule(str(cache), (40, 56, 40), 16, num_workers=2))
    return pairs[1:]


def _switch(watching: list[Any], pairs: list[tuple[float, float]], device: Any) -> Callback:
    import torch
    from lightning.pytorch import Callback

    class Switch(Callback):
        began, with_s, guard = 0.0, 0.0, None

        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.began = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step % STEPS:
                return
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = (time.perf_counter() - self.began) / STEPS
            turn_on = not watching[0].active
            if turn_on:
                pairs.append((self.with_s, seconds))
            self.with_s = seconds
            self.guard, module._guard = module._guard, self.guard or _NoGuard()
            module.parents = [] if turn_on else None
            for callback in watching:
                callback.active = turn_on
                callback.on_step_restored(trainer.global_step)
            self.began = time.perf_counter()

    return Switch()
