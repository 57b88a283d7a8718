"""The share of hidden tokens over the run."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

import lightning.pytorch as pl

from agssd.callbacks.standing import StandingCallback, total_steps
from agssd.schedules import cosine, linear
from agssd.types import MaskScheduled


class MaskRatioSchedule(StandingCallback):
    """Sets ``module.mask_ratio`` = (low, high) before the views of each step are made.

    A pure function of the share of optimiser steps done, so a resumed run goes on exactly and nothing is stored. The
    micro-batches of one step share one value.

    Source: the range is [R: DINOv2, 3DINO, SPECTRE] with our limits (docs/method.md §1.3); the ramps are ours.

    Args:
        kind: ``own`` leaves the ratio that the method states, so that one method's ratio never becomes another's;
            ``range`` draws each sample's ratio between ``start`` and ``end`` for the whole run; ``constant`` hides
            ``start`` of the tokens; ``linear`` and ``cosine`` go from ``start`` to ``end`` over the run.
        start: share of tokens in (0, 1).
        end: share of tokens in (0, 1); used by ``range``, ``linear`` and ``cosine``.
    """

    needs: ClassVar[type[Any]] = MaskScheduled

    def __init__(
        self,
        kind: Literal["own", "range", "constant", "linear", "cosine"] = "own",
        start: float = 0.3,
        end: float = 0.7,
    ) -> None:
        super().__init__()
        if kind not in ("own", "range", "constant", "linear", "cosine"):
            raise ValueError(f"mask_ratio.kind is {kind!r}; choose own, range, constant, linear or cosine")
        for name, value in (("start", start), ("end", end)):
            if not 0.0 < value < 1.0:
                raise ValueError(
                    f"mask_ratio.{name} is {value}; a share of hidden tokens lies strictly between 0 and 1"
                )
        if kind == "range" and start > end:
            raise ValueError(f"mask_ratio has start {start} above end {end}; a range needs start <= end")
        self.kind = kind
        self.start = start
        self.end = end
        self._total = 0

    def ratio(self, progress: float) -> tuple[float, float]:
        """Return (low, high) at ``progress``, the share of optimiser steps done, where ``kind`` is not ``own``."""
        if self.kind == "range":
            return self.start, self.end
        if self.kind == "constant":
            return self.start, self.start
        value = (linear if self.kind == "linear" else cosine)(progress, self.start, self.end)
        return value, value

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the ratio of the first step."""
        if self.active:
            self._total = total_steps(trainer)
            self._apply(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the ratio of this batch, then set the next one's.

        Not in ``on_train_batch_start``: by then Lightning has already moved the batch to the device, which is where
        the views and masks are made.
        """
        if not self.active:
            return
        low, high = cast(MaskScheduled, pl_module).mask_ratio
        pl_module.log_dict({"train/mask_ratio_low": low, "train/mask_ratio_high": high})
        self._apply(trainer, pl_module)

    def _apply(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.kind != "own":
            cast(MaskScheduled, pl_module).mask_ratio = self.ratio(trainer.global_step / self._total)
