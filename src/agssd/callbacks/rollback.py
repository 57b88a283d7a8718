"""Back to the last healthy checkpoint in a run that goes on, with a lower teacher temperature or learning rate."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from agssd.callbacks.actions import record_action, stop_run
from agssd.callbacks.collapse_alarms import Alarm
from agssd.callbacks.standing import log_figures
from agssd.run.checkpoints import HEALTHY, LAST, check_whole, is_local, read_checkpoint
from agssd.types import Easeable

_LOG = logging.getLogger(__name__)
_CANDIDATE = "healthy.candidate"  # in the folder of checkpoints, from the first sample of a report to its verdict


class Rollback:
    """Keeps the last healthy checkpoint, and brings a run back to it on every rank alike.

    Args:
        max_rollbacks: after which the next one stops the run.
        factors: of ``temperature`` and ``lr``, in (0, 1).

    Raises:
        ValueError: for a negative number or a factor outside (0, 1).
    """

    def __init__(self, max_rollbacks: int, factors: dict[str, float]) -> None:
        if max_rollbacks < 0:
            raise ValueError(f"collapse_monitor.max_rollbacks is {max_rollbacks}; it must be at least 0")
        for name, factor in factors.items():
            if not 0 < factor < 1:
                raise ValueError(f"collapse_monitor.{name}_factor is {factor}; it must lie between 0 and 1")
        self.max_rollbacks = max_rollbacks
        self.factors = factors
        self.done: list[dict[str, Any]] = []  # one per rollback: from_step, to_step, alarms, lowered
        self.pending: dict[str, Any] = {}  # of the rollback that the next step begins with: alarms, lowered
        self.stopped = ""
        self._told = ""  # why the pending one is due
        self._candidate: tuple[int, int] | None = None  # the file that the next report judges
        self._judged: tuple[int, int] | None = None  # the last one that was judged

    def state_dict(self) -> dict[str, Any]:
        """Return what was done and what is still due."""
        return {"rollbacks": [dict(one) for one in self.done], "pending": dict(self.pending)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        self.done, self.pending = list(state_dict.get("rollbacks", [])), dict(state_dict.get("pending", {}))

    # ---------------------------------------------------------------- health

    def note_newest(self, trainer: pl.Trainer) -> None:
        """Hold on to the newest checkpoint that is on disk: what is measured from now on are weights like its own.

        Called when the first sample of a report is collected. A checkpoint that is saved later could be broken already
        while most of the report's samples are from before, so it has to wait for the next report.
        """
        folder = checkpoint_folder(trainer)
        if not trainer.is_global_zero or folder is None:
            return
        newest = folder / LAST
        try:
            mark = newest.stat().st_ino, newest.stat().st_mtime_ns
            if mark != self._judged:
                _link(newest.resolve(), folder / _CANDIDATE)
                self._candidate = mark
        except FileNotFoundError:  # none yet, or its turn to be removed was just now
            self._candidate = None

    def judge_newest(self, trainer: pl.Trainer, monitor: str, healthy: bool) -> None:
        """Keep the checkpoint held on to as the healthy one if no alarm stood when it was saved, else let go of it.

        Args:
            trainer: of the run.
            monitor: key of the monitor's state in checkpoints.
            healthy: whether the report that followed it had no alarm.
        """
        folder, self._judged = checkpoint_folder(trainer), self._candidate or self._judged
        if folder is None or self._candidate is None:
            return
        held, self._candidate = folder / _CANDIDATE, None
        try:
            saved = read_checkpoint(str(held)) if healthy else {}
        except ValueError as error:
            _LOG.warning("%s; the healthy checkpoint stays the one before", error)
            healthy = False
        if healthy and (held.is_dir() or saved["callbacks"].get(monitor, {}).get("standing") == []):
            if (folder / HEALTHY).is_dir():
                _remove(folder / HEALTHY)
            held.replace(folder / HEALTHY)
        _remove(held)

    def let_go(self, trainer: pl.Trainer) -> None:
        """Let go of a checkpoint that no report has judged, also of a process before."""
        folder, self._candidate = checkpoint_folder(trainer), None
        if trainer.is_global_zero and folder is not None:
            _remove(folder / _CANDIDATE)

    # -------------------------------------------------------------- rollback

    def demand(self, trainer: pl.Trainer, module: Easeable, alarms: list[Alarm]) -> None:
        """Roll back before the next step, or stop where that is not possible; called on every rank alike."""
        names, told = [alarm.name for alarm in alarms], "; ".join(alarm.sentence for alarm in alarms)
        reason = trainer.strategy.broadcast(_why_not(checkpoint_folder(trainer), trainer.global_step))
        if len(self.done) >= self.max_rollbacks:
            self.stopped = f"{told}; collapse_monitor.max_rollbacks is {self.max_rollbacks}, and as many were made"
        elif reason:
            self.stopped = f"{told}; {reason}"
        else:
            possible = module.can_ease()
            before = sum(names[0] in one["alarms"] for one in self.done)
            first = alarms[0].lower if alarms[0].lower in possible else possible[0]
            order = [first, *(name for name in possible if name != first)]
            self.pending, self._told = {"alarms": names, "lowered": order[before % len(order)]}, told
            return
        stop_run(trainer, self.stopped, alarms=names)

    def end(self, trainer: pl.Trainer, total: int) -> None:
        """Say so if a rollback is due after the last of ``total`` steps, so that nobody takes the weights for sound.

        A run that ends before goes on with the rollback when it is resumed.
        """
        if self.pending and trainer.global_step >= total:
            names, self.pending = self.pending["alarms"], {}
            self.stopped = (
                f"{self._told}; that was the last step, so nothing was rolled back: take {HEALTHY} of checkpoints/, "
                "which was saved before the alarm"
            )
            stop_run(trainer, self.stopped, alarms=names)

    def carry_out(self, trainer: pl.Trainer, module: pl.LightningModule) -> int:
        """Go back, and return the step that was left; between two optimiser steps, on every rank alike."""
        pending, self.pending = self.pending, {}
        self.let_go(trainer)
        folder, left = checkpoint_folder(trainer), trainer.global_step
        assert folder is not None
        step = restore_training(trainer, module, folder / HEALTHY)
        eased = cast(Easeable, module).eased
        eased[pending["lowered"]] *= self.factors[pending["lowered"]]
        self.done.append({"from_step": left, "to_step": step, **pending})
        figures = {"rollbacks": float(len(self.done))} | {f"eased_{name}": value for name, value in eased.items()}
        log_figures(trainer, {f"collapse/{name}": value for name, value in figures.items()})
        record_action(trainer, "rollback", from_step=left, to_step=step, **pending, factors=dict(eased))
        if trainer.is_global_zero:
            _LOG.warning(
                "step %d: rolled back to the healthy checkpoint of step %d because of %s; %s is now %.3g of what is "
                "scheduled (rollback %d of %d)",
                *(left, step, ", ".join(pending["alarms"]), pending["lowered"], eased[pending["lowered"]]),
                *(len(self.done), self.max_rollbacks),
            )
        return left


def checkpoint_folder(trainer: pl.Trainer) -> Path | None:
    """Return where the run's checkpoints lie, None if it writes none or not to a file system of this machine."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            return Path(callback.dirpath) if is_local(str(callback.dirpath)) else None
    return None


def _why_not(folder: Path | None, step: int) -> str:
    """Return why a run at ``step`` cannot be rolled back; empty if it can."""
    if folder is None or not (folder / HEALTHY).exists():
        return (
            "there is no healthy checkpoint to roll back to: none was saved before the alarm, see "
            "checkpoint.every_n_train_steps, or checkpoint.dirpath is no folder of this machine"
        )
    try:
        of = int(read_checkpoint(str(folder / HEALTHY))["global_step"])
        check_whole(str(folder / HEALTHY))
    except ValueError as error:
        return f"there is no healthy checkpoint to roll back to: {error}"
    return f"{HEALTHY} is of step {of}, which this run has yet to reach" if of > step else ""


def restore_training(trainer: pl.Trainer, module: pl.LightningModule, path: Path) -> int:
    """Set weights, teacher, centres, optimiser, gradient scaler and step to a checkpoint's, and return its step.

    The stream of samples goes on behind those already drawn; the data module is told how many steps were undone, so
    that a resumed run goes on at the same place. Callbacks keep what they know.
    """
    strategy, left = trainer.strategy, trainer.global_step
    for callback in cast(Any, trainer).callbacks:
        if hasattr(callback, "before_step_restored"):
            callback.before_step_restored(trainer, module)
    checkpoint = strategy.load_checkpoint(path, weights_only=True)
    strategy.load_model_state_dict(checkpoint, strict=True)
    strategy.load_optimizer_state_dict(checkpoint)
    precision = trainer.precision_plugin
    if type(precision).__qualname__ in checkpoint:
        precision.load_state_dict(checkpoint[type(precision).__qualname__])
    step = int(checkpoint["global_step"])
    loop = trainer.fit_loop.epoch_loop
    progress = loop.automatic_optimization.optim_progress.optimizer.step
    for counts in (progress.total, progress.current):
        counts.ready -= left - step
        counts.completed -= left - step
    loop._batches_that_stepped -= left - step
    data: Any = getattr(trainer, "datamodule", None)
    if hasattr(data, "undone_steps"):
        data.undone_steps += left - step
    for callback in cast(Any, trainer).callbacks:
        if hasattr(callback, "on_step_restored"):
            callback.on_step_restored(step)
    assert trainer.global_step == step
    return step


def _link(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source`` where the disk can link, else a copy; a folder is copied."""
    _remove(target)
    if source.is_dir():
        shutil.copytree(source, target)  # what is in it may be written over
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _remove(path: Path) -> None:
    """Remove a file or folder that may not be there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
