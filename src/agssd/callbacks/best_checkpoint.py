"""The weights that the probe while training likes best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from agssd.types import PROBE_FIGURES

PREFIX = "probe/"


class BestCheckpoint(ModelCheckpoint):
    """Keeps ``checkpoints/best.ckpt``, of the step with the best probe so far, beside the newest of RunCheckpoint.

    Written right after a probe of :class:`agssd.callbacks.online_probe.OnlineProbe` that beats every earlier one, those
    before an interruption included if their ``best.ckpt`` is still there; a file is replaced when the new one is whole.
    Untrained weights and figures that are not finite are no candidates. Does nothing in a run that is not probed.
    It stands before other checkpoints in the trainer's callbacks: what they save in the same step knows of it.

    Source: ours.

    Args:
        figure: ``probe/<figure>`` to choose by, more being better; null for the first that is measured of Dice of
            linear and of k-NN segmentation, balanced accuracy of linear and of k-NN classification.
        enabled: whether to keep it.
        dirpath: another place for it.
    """

    def __init__(self, figure: str | None = None, enabled: bool = True, dirpath: str | None = None) -> None:
        super().__init__(
            dirpath=dirpath, filename="best", mode="max", every_n_train_steps=1, enable_version_counter=False
        )
        self.figure = figure
        self.enabled = enabled
        self._measured = -1
        self._restored: tuple[str | None, Any] | None = None  # figure and score of the best so far

    @property
    def state_key(self) -> str:
        """The same for every figure: which one decides is known after a checkpoint is read."""
        return type(self).__qualname__

    def choose_by(self, measured: Sequence[str]) -> None:
        """Choose by the figure that was asked for, else by the first of the list above; called before the first step.

        Args:
            measured: ``probe/<figure>`` of every figure of this run; empty where nothing is probed.

        Raises:
            ValueError: for a figure that is asked for and not measured.
        """
        if self.figure is not None and self.enabled and self.figure not in measured:
            remedy = (
                f"choose one of {', '.join(measured)}"
                if measured
                else "there is no labelled cache: give one with --online_probe.cache"
            )
            raise ValueError(f"best_checkpoint.figure is {self.figure}, which is not measured in this run; {remedy}")
        self.monitor = self.figure or next((PREFIX + name for name in PROBE_FIGURES if PREFIX + name in measured), None)

    def probed(self, step: int) -> None:
        """Take note that the figures of ``trainer.callback_metrics`` are those of the weights after ``step`` steps."""
        self._measured = step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on from the best of an interrupted run, unless another figure chose it or its file is gone."""
        super().on_train_start(trainer, pl_module)
        (chosen_by, score), self._restored = self._restored or (None, None), None
        if score is None or self.monitor is None or not self.enabled:
            return
        path = Path(str(self.dirpath)) / f"{self.filename}{self.FILE_EXTENSION}"
        if chosen_by != self.monitor:
            rank_zero_info(f"best.ckpt was chosen by {chosen_by}; from now on it is by {self.monitor}")
        elif not trainer.strategy.broadcast(path.is_file()):  # a run goes on elsewhere, which Lightning would forget
            rank_zero_info(f"there is no {path} of the earlier part of this run; its best is looked for from now on")
        else:
            self.best_model_path = self.kth_best_model_path = str(path)
            self.best_model_score = self.kth_value = score
            self.best_k_models = {str(path): score}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the weights if they were just probed and are the best."""
        self._keep_if_best(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Consider the last weights, which are probed after the last step."""
        self._keep_if_best(trainer)

    def _keep_if_best(self, trainer: L.Trainer) -> None:
        if not self.enabled or self.monitor is None or self._measured != trainer.global_step:
            return
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if math.isfinite(float(candidates[self.monitor])):
            self._save_topk_checkpoint(trainer, candidates)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the best so far, and by which figure, whatever the directory was called then."""
        self._restored = (state_dict["monitor"], state_dict["best_model_score"])
