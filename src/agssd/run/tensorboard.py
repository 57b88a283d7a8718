"""TensorBoard gets every scalar that ``metrics.csv`` and W&B get."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from agssd.run.artifacts import without_paths

TENSORBOARD = "tensorboard"


class RunTensorBoardLogger(TensorBoardLogger):
    """Writes every scalar to ``DIR/tensorboard`` at once and appends to it after a resume.

    The settings are kept beside them without paths.

    Args:
        directory: the run directory.

    Raises:
        ValueError: if TensorBoard is not installed.
    """

    def __init__(self, directory: Path) -> None:
        """Keep the names; nothing is written before the run starts."""
        if find_spec(TENSORBOARD) is None:
            raise ValueError(
                "tensorboard is true, but TensorBoard is not installed: pip install 'agssd[tensorboard]', or leave it "
                "out; metrics.csv holds the same figures"
            )
        super().__init__(save_dir=str(directory), name="", version=TENSORBOARD, default_hp_metric=False)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write the figures to disk: a killed run keeps them, as it keeps its rows of ``metrics.csv``."""
        super().log_metrics(metrics, step)
        self.experiment.flush()

    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: dict[str, Any] | None = None, step: int | None = None) -> None:
        """Keep the settings, with whatever names a file taken out."""
        super().log_hyperparams(without_paths(params), metrics, step)

    def rewind(self, step: int) -> None:
        """Drop the figures of optimiser steps after the first ``step``: they are about to be written again.

        Called before the first figure is logged. Readers leave out what lies in files that are there already.
        """
        self._kwargs["purge_step"] = step
