"""A student with a teacher whose steps take as long as a test needs them to, so that it can strike between them."""

from __future__ import annotations

import copy
import os
import time
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from agssd.models.ema import update_ema
from agssd.run import slurm
from agssd.run.stop_signals import STOP


class PacedToy(L.LightningModule):
    """Its loss depends on the sample's number and on dropout, its weights on momentum: on every state there is."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.student = nn.Linear(8, 8)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def update_teacher(self, momentum: float) -> None:
        """Move the teacher."""
        update_ema(self.student, self.teacher, momentum)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Take TOY_STEP_S seconds over a step; TOY_ENDLESS=RANK:STEP never ends, TOY_RAISE=STEP fails on every rank.

        TOY_HOLD=STEP ends in the first start of a SLURM job not before this rank is told to stop.
        """
        time.sleep(float(os.environ.get("TOY_STEP_S", "0")))
        while os.environ.get("TOY_HOLD") == str(self.global_step) and STOP.received is None and not slurm.restarts():
            time.sleep(0.01)
        if os.environ.get("TOY_ENDLESS") == f"{self.global_rank}:{self.global_step}":
            endless()
        if os.environ.get("TOY_RAISE") == str(self.global_step):
            raise RuntimeError(f"the toy fails at step {self.global_step}")
        image = batch["image"].float().flatten(1)[:, :64].reshape(-1, 8, 8) / 300.0
        target = self.teacher(image) + torch.sin(batch["sample"].float())[:, None, None]
        loss = (nn.functional.dropout(self.student(image), 0.1) - target).square().mean()
        self.log("train/loss", loss, sync_dist=True)
        return loss

    def on_fit_end(self) -> None:
        """Have the first rank take TOY_END_S seconds longer to end than the others."""
        if self.global_rank == 0:
            time.sleep(float(os.environ.get("TOY_END_S", "0")))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.student.parameters(), lr=self.lr, momentum=0.9)


def endless() -> None:
    """Never return."""
    while True:
        time.sleep(0.01)
