"""What a checkpoint costs the training: how long it stands still, beside a write it waits for and beside a step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from agssd.commands._bench_probe import bench_trainer, quiet, write_cache

if TYPE_CHECKING:
    from agssd.callbacks.run_checkpoint import RunCheckpoint

_BETWEEN = 4  # optimiser steps from one save to the next


@dataclass
class Saves:
    """Seconds, one of each per round, and the size of the file."""

    stall: list[float] = field(default_factory=list)  # of the training, where the file is written behind it
    waited: list[float] = field(default_factory=list)  # of the same with the write, sync and rename before it goes on
    step: list[float] = field(default_factory=list)  # median of the steps while nothing is written
    megabytes: float = 0.0


def time_saving(rounds: int, device: Any, folder: Path, size: Literal["tiny", "small", "base"]) -> Saves:
    """Train DINO with a checkpoint every few steps, in turn written in the background and before the run goes on.

    The tiny encoder is that of conf/experiment/small.yaml, 16 samples per step; the others see 512 tokens per view and
    2 samples per step. A file holds student, teacher and the optimiser's two moments.

    Args:
        rounds: how many, after one that does not count.
        device: torch device.
        folder: for the cache of simulated volumes and the checkpoints.
        size: of the encoder.
    """
    from agssd.callbacks.ema_teacher import EMATeacher
    from agssd.data_modules.pretrain import PretrainDataModule
    from agssd.methods.dino import DINO
    from agssd.models.vit import ViT
    from agssd.transforms.crops import OverlapCrops

    cache = folder / f"saving-{size}.h5"
    write_cache(cache)
    found = Saves()
    with quiet():
        trainer = bench_trainer(
            device,
            max_steps=2 * (rounds + 1) * _BETWEEN + 1,
            callbacks=[EMATeacher(), _timed(found, device, str(folder / f"saving-{size}"))],
            default_root_dir=folder,
        )
        tiny = size == "tiny"
        encoder = ViT(1, 8, embed_dim=192, depth=4, num_heads=3) if tiny else ViT(1, 4, size=size)
        views = OverlapCrops(size_vox=(32, 32, 32), scale=(0.4, 0.9), num_local=0)
        module = DINO(encoder, views, num_prototypes=512, head_hidden=512, head_bottleneck=128)
        trainer.fit(module, PretrainDataModule(str(cache), (40, 56, 40), 16 if tiny else 2, num_workers=2))
    return found


def _timed(found: Saves, device: Any, folder: str) -> RunCheckpoint:
    import torch

    from agssd.callbacks.run_checkpoint import RunCheckpoint

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    class Timed(RunCheckpoint):
        began, steps, saves = 0.0, list[float](), 0

        def on_train_batch_start(self, trainer: Any, *given: Any) -> None:
            files = trainer.strategy.checkpoint_io
            if self.began and not files.in_background:
                self.steps.append(clock() - self.began)
            super().on_train_batch_start(trainer, *given)
            self.began = clock()

        def save(self, trainer: Any) -> None:
            files = trainer.strategy.checkpoint_io
            files.wait()
            files.in_background = not files.in_background
            began = clock()
            super().save(trainer)
            seconds = clock() - began
            self.saves += 1
            if self.saves <= 2 or trainer.global_step == trainer.max_steps:
                self.steps.clear()
            elif files.in_background:
                found.stall.append(seconds)
                found.step.append(median(self.steps))
                self.steps.clear()
            else:
                found.waited.append(seconds)
                found.megabytes = Path(self.last_model_path).stat().st_size / 1e6

    return Timed(every_n_train_steps=_BETWEEN, dirpath=folder, keep_last=1, in_background=True)
