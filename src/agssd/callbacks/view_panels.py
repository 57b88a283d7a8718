"""Pictures of what the module sees: views with their overlap, edges, masks, reconstruction, attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import WandbLogger

from agssd.callbacks.standing import StandingCallback
from agssd.sharding import gathered, is_sharded
from agssd.types import Observable, ViewPanel


class ViewPanels(StandingCallback):
    """Draws ``<default_root_dir>/panels/step_XXXXXX.png`` after the first step, at intervals, and at the end.

    One picture shows ``num_samples`` samples of the last batch; it holds no case name and no path. Rank 0 draws, and
    sends the picture to W&B where a ``WandbLogger`` is used. ``module.view_panel`` must not communicate over ranks.

    Args:
        every_n_steps: optimiser steps between pictures.
        num_samples: samples in a picture, at most the batch size of a rank.
    """

    needs: ClassVar[type[Any]] = Observable

    def __init__(self, every_n_steps: int = 500, num_samples: int = 2) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"view_panels.every_n_steps is {every_n_steps}; it must be at least 1")
        if num_samples < 1:
            raise ValueError(f"view_panels.num_samples is {num_samples}; it must be at least 1")
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self._step = 0
        self._drawn = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the step that the run starts or resumes at."""
        self._step = self._drawn = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw if this batch completed an optimiser step that is due."""
        if not self.active or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step == 1 or self._step % self.every_n_steps == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the last batch, unless that was just done."""
        if self.active and self._step != self._drawn:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._drawn = self._step
        if not trainer.is_global_zero and not is_sharded(module):
            return
        with gathered(module):
            panels = self._panels(cast(Observable, module))
        if not trainer.is_global_zero:
            return
        from agssd.callbacks.panel_drawing import save_panels  # matplotlib only where a picture is made

        path = Path(trainer.default_root_dir) / "panels" / f"step_{self._step:06d}.png"
        save_panels(panels, path, title=f"step {self._step}")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(key="panels", images=[str(path)], step=max(trainer.global_step - 1, 0))

    @torch.no_grad()
    def _panels(self, module: Observable) -> list[ViewPanel]:
        panels = [module.view_panel(0)]
        for index in range(1, self.num_samples):
            try:
                panels.append(module.view_panel(index))
            except IndexError:  # the batch has fewer samples
                break
        return panels
