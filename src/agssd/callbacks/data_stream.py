"""What the run has drawn from each of its caches, and how many samples a broken case cost."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from agssd.callbacks.standing import StandingCallback, log_figures


class DataStream(StandingCallback):
    """Logs every ``every_n_steps`` optimiser steps what the data module says of its stream.

    Keys: ``data/source<N>_samples``, samples drawn from the N-th cache of ``data.cache`` (from 0) since the run began,
    resumed parts included; ``data/source<N>_passes``, the same over its training cases; with ``data.on_broken
    quarantine`` also ``data/replaced_samples``, samples of all ranks that were drawn from another case because theirs
    could not be read, since this part of the run began. Caches go by number, since a path may name a patient.

    Args:
        every_n_steps: optimiser steps between figures.
    """

    needs: ClassVar[type[Any]] = pl.LightningModule

    def __init__(self, every_n_steps: int = 50) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"data_stream.every_n_steps is {every_n_steps}; it must be at least 1")
        self.every_n_steps = every_n_steps
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget an earlier fit."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log after every so many steps."""
        data: Any = getattr(trainer, "datamodule", None)
        if not self.active or trainer.global_step == self._step or not hasattr(data, "stream_figures"):
            return
        self._step = trainer.global_step
        if self._step % self.every_n_steps:
            return
        figures = data.stream_figures((self._step + getattr(data, "undone_steps", 0)) * data.global_batch_size)
        if data.quarantine is not None:
            replaced = pl_module.all_gather(torch.tensor(data.quarantine.num_replaced, device=pl_module.device))
            assert isinstance(replaced, Tensor)
            figures["data/replaced_samples"] = float(replaced.sum())
        log_figures(trainer, figures)
