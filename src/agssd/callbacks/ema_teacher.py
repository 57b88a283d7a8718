"""When the teacher moves, and how far: once per optimiser step, by a momentum that rises over the run."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import lightning.pytorch as pl

from agssd.callbacks.standing import StandingCallback, total_steps
from agssd.schedules import cosine, teacher_start_momentum
from agssd.types import TeacherStudent


class EMATeacher(StandingCallback):
    """Updates the momentum teacher after every optimiser step, not after every micro-batch.

    The momentum of update ``n`` (from 1) of ``N`` is half a cosine from ``momentum_start`` to ``momentum_end`` at
    progress ``(n - 1) / N``: a pure function of the step, so a resumed run goes on exactly and nothing is stored.

    Source: the schedule is BYOL's and DINO's; the start by half-life is ours (docs/method.md §1.5).

    Args:
        momentum_start: share of the teacher kept by the first update; null gives a half-life of 2 % of the run,
            at most 0.996.
        momentum_end: share that the momentum tends to.
    """

    needs: ClassVar[type[Any]] = TeacherStudent
    updates_teacher: ClassVar[bool] = True

    def __init__(self, momentum_start: float | None = None, momentum_end: float = 1.0) -> None:
        super().__init__()
        for name, value in (("momentum_start", momentum_start), ("momentum_end", momentum_end)):
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"ema_teacher.{name} is {value}; a momentum lies in [0, 1]")
        self.momentum_start = momentum_start
        self.momentum_end = momentum_end
        self._step = 0
        self._total = 0

    def momentum(self, step: int, total: int) -> float:
        """Return the momentum of the update that follows optimiser step ``step`` (from 1) of ``total``."""
        start = teacher_start_momentum(total) if self.momentum_start is None else self.momentum_start
        return cosine((step - 1) / total, start, self.momentum_end)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the step that the run starts or resumes at."""
        if self.active:
            self._step = trainer.global_step
            self._total = total_steps(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the teacher if this batch completed an optimiser step."""
        if not self.active or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        momentum = self.momentum(self._step, self._total)
        cast(TeacherStudent, pl_module).update_teacher(momentum)
        pl_module.log("train/ema_momentum", momentum)
