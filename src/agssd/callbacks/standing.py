"""What the standing callbacks share: they are in every run, and do nothing for a module they cannot serve."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback


class StandingCallback(Callback):
    """A callback that is always registered: inert for a module without its protocol, unless it was asked for.

    ``explicit`` is set by the CLI when the user configured the callback; a module that cannot use it is then an error.
    ``active`` is decided in ``setup`` and is False outside ``fit``.
    """

    needs: ClassVar[type[Any]]
    explicit: bool = False
    active: bool = False
    _step: int = 0  # optimiser steps done when the callback last looked

    def usable(self, module: pl.LightningModule) -> bool:
        """Return whether ``module`` implements the protocol that this callback works through."""
        return isinstance(module, self.needs)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Decide whether to act in this run.

        Raises:
            ValueError: if the callback was configured explicitly for a module that cannot use it.
        """
        self.active = stage == "fit" and self.usable(pl_module)
        if stage == "fit" and self.explicit and not self.active:
            raise ValueError(
                f"{type(self).__name__} is configured, but {type(pl_module).__name__} does not implement "
                f"agssd.types.{self.needs.__name__}; remove the callback's settings or choose another method"
            )

    def on_step_restored(self, step: int) -> None:
        """Take note that a rollback has put the run back to ``step``."""
        self._step = step

    def check_data(self, trainer: pl.Trainer, pl_module: pl.LightningModule, data: Any) -> None:
        """Refuse what cannot work with ``data``, the data module, which has been set up; called before a fit."""


def total_steps(trainer: pl.Trainer) -> int:
    """Return the number of optimiser steps of the whole run, the denominator of every schedule.

    Raises:
        ValueError: if the run has no end.
    """
    steps = trainer.estimated_stepping_batches
    if not math.isfinite(steps) or steps < 1:
        raise ValueError(f"the run has no length ({steps} optimiser steps); set trainer.max_steps to a positive number")
    return int(steps)


def log_figures(trainer: pl.Trainer, figures: dict[str, float]) -> None:
    """Send ``figures`` to every logger and to ``trainer.callback_metrics``, for the optimiser step just done.

    For figures that are rarer than ``log_every_n_steps``: ``module.log`` would drop them whenever the two rhythms
    do not coincide. The step is the one Lightning gives to the metrics of the same batch.
    """
    for logger in trainer.loggers:
        logger.log_metrics(figures, step=max(trainer.global_step - 1, 0))
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
