"""The one line of checkpoints of a run, from which it goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as L
import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from agssd.distributed import all_max, gather_objects
from agssd.run.checkpoints import (
    HEALTHY,
    LAST,
    CheckpointFiles,
    is_local,
    link_checkpoint,
    list_checkpoints,
    read_checkpoint,
    set_aside,
)

_STEP = re.compile(r"step(\d+)\.ckpt$")


class RunCheckpoint(ModelCheckpoint):
    """Writes ``DIR/checkpoints/step<N>.ckpt`` every so many optimiser steps and after the last.

    The newest is also called ``last.ckpt``.

    It is written between two steps: the teacher has moved, figures of the step are logged, validation is done, and
    nothing of the next one has begun, whatever the accumulation. So a resumed run repeats nothing and leaves nothing
    out. The file also holds, of every rank, the random states and the ``rank_state`` of callbacks that have one.

    Args:
        every_n_train_steps: optimiser steps between two checkpoints.
        save_top_k: how many of the best by ``monitor`` to keep besides the newest, -1 for all.
        monitor: metric to keep the best by.
        mode: whether a small (``min``) or large (``max``) metric is good.
        dirpath: another place for the checkpoints.
        keep_last: how many of the newest to keep, at least 1, or -1 for all; a torn one is replaced by the one before.
        in_background: write while training goes on, see :class:`agssd.run.checkpoints.CheckpointFiles`.

    Raises:
        ValueError: for ``keep_last`` 0.
    """

    def __init__(
        self,
        every_n_train_steps: int = 1000,
        save_top_k: int = 1,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        dirpath: str | None = None,
        keep_last: int = 2,
        in_background: bool = True,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="step{step:08d}",
            auto_insert_metric_name=False,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k if monitor else 1,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )
        if keep_last < 1 and keep_last != -1:
            raise ValueError(f"checkpoint.keep_last is {keep_last}; give at least 1, or -1 to keep all")
        self.keep_last = keep_last
        self.in_background = in_background
        self._scores: dict[int, float] = {}
        self._random: tuple[int, dict[str, Any]] | None = None  # after a step, before anything of the next
        self._restored: dict[str, Any] | None = None
        self._asked_for = -1  # a step
        self.saved: int | None = None  # step of the newest one of the rhythm: the same however often a run is cut
        self._saved_here = False  # by this process, so that it is there or on its way

    @property
    def state_key(self) -> str:
        """The same however often and by whatever metric it saves."""
        return type(self).__qualname__

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Have the files written by :class:`CheckpointFiles`, unless the user has named another plugin."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFiles(self.in_background)

    # ------------------------------------------------------------------- save

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save what the step before has left."""
        if isinstance(trainer.strategy.checkpoint_io, CheckpointFiles):
            trainer.strategy.checkpoint_io.raise_failure()
        if self._is_due(trainer) and not self._should_skip_saving_checkpoint(trainer):
            self.save(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the random states: the next batch is made before it starts."""
        self._random = trainer.global_step, random_states()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the random states where they were: a run does not depend on which validations a signal has left out."""
        if self._random is not None:
            set_random_states(self._random[1])

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do nothing: the stream has no epochs."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step also where it is no multiple of the interval; again where a signal has had it saved."""
        step = trainer.global_step
        if step == self._last_global_step_saved and step != self._asked_for:
            return
        if not cast(Any, trainer).fast_dev_run:
            self.save(trainer)

    def save_before_next(self, trainer: L.Trainer) -> None:
        """Save the step just done like one of the rhythm; called on every rank at the end of that step."""
        self._asked_for = trainer.global_step

    def save(self, trainer: L.Trainer) -> None:
        """Write the checkpoint of the step just done and drop those that are no longer kept; called on every rank."""
        for callback in cast(Any, trainer).callbacks:
            if hasattr(callback, "settle"):  # what it knows of the step by now belongs into the file
                callback.settle(trainer, trainer.lightning_module)
        step, figures = trainer.global_step, self._monitor_candidates(trainer)
        path = self.format_checkpoint_name(figures)
        if self.monitor in figures:
            self._scores[step] = float(figures[self.monitor])
        best = self._best()
        self.best_model_path = path if not best else self.format_checkpoint_name({"step": torch.tensor(best[0])})
        self.last_model_path = os.path.join(str(self.dirpath), LAST)
        if self._every_n_train_steps < 1 or step % self._every_n_train_steps == 0:
            self.saved, self._saved_here = step, True
        self._save_checkpoint(trainer, path)
        files = trainer.strategy.checkpoint_io
        if not isinstance(files, CheckpointFiles):
            self._save_checkpoint(trainer, self.last_model_path)
        if not trainer.is_global_zero:
            return
        if isinstance(files, CheckpointFiles):
            files.link(path, self.last_model_path)
        stored = sorted({step, *(of for of in self._stored() if of < step)})  # later ones lie there after a rollback
        kept = {*best, *(stored if self.keep_last == -1 else stored[-self.keep_last :])}
        for old in stored:
            if old not in kept:
                self._scores.pop(old, None)
                self._remove_checkpoint(trainer, self.format_checkpoint_name({"step": torch.tensor(old)}))

    def link_saved(self, trainer: L.Trainer, name: str) -> None:
        """Give the newest checkpoint of the rhythm a second name in its folder, if it is there or on its way."""
        path = self.format_checkpoint_name({"step": torch.tensor(self.saved)})
        if trainer.is_global_zero and (self._saved_here or os.path.exists(path)):
            files = trainer.strategy.checkpoint_io
            link = files.link if isinstance(files, CheckpointFiles) else link_checkpoint
            link(path, os.path.join(str(self.dirpath), name))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store what each rank alone knows."""
        noted = self._random
        own = {"random": noted[1] if noted is not None and noted[0] == trainer.global_step else random_states()}
        own |= {name: callback.rank_state() for name, callback in _with_rank_state(trainer)}
        checkpoint["ranks"] = gather_objects(own)

    def state_dict(self) -> dict[str, Any]:
        """Return the metric of every step that has one, and the newest step of the rhythm."""
        return {"scores": dict(self._scores), "saved": self.saved}

    def _is_due(self, trainer: L.Trainer) -> bool:
        step, rhythm = trainer.global_step, self._every_n_train_steps
        return step == self._asked_for or (rhythm > 0 and step % rhythm == 0)

    def _best(self) -> list[int]:
        """Return the steps of the best checkpoints by the metric, the best first."""
        ranked = sorted(self._scores, key=lambda step: self._scores[step], reverse=self.mode == "max")
        ranked = [step for step in ranked if self._scores[step] == self._scores[step]]
        return ranked if self.save_top_k == -1 else ranked[: self.save_top_k]

    def _stored(self) -> list[int]:
        """Return the steps of which there is a file."""
        return sorted(int(found[1]) for found in map(_STEP.search, list_checkpoints(str(self.dirpath))) if found)

    # ----------------------------------------------------------------- resume

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the metrics of an interrupted run."""
        self._scores, self.saved = dict(state_dict.get("scores", {})), state_dict.get("saved")

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take up what each rank alone knew, and put Lightning's counters where this cut of the batch has them."""
        if trainer.state.fn != "fit":
            return
        ranks = checkpoint.get("ranks", [])
        self._restored = ranks[trainer.global_rank] if len(ranks) == trainer.world_size else None
        if hasattr(cast(Any, trainer).datamodule, "global_batch_size"):
            align_counters(checkpoint["loops"], checkpoint["global_step"], trainer.accumulate_grad_batches)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on from the step that was loaded.

        Raises:
            ValueError: if the ranks have loaded different steps.
        """
        super().on_train_start(trainer, pl_module)
        step = self._last_global_step_saved = trainer.global_step
        ends = all_max(torch.tensor([step, -step], device=pl_module.device)).tolist()
        if ends != [step, -step]:
            raise ValueError(
                f"ranks start from different steps ({-ends[1]} to {ends[0]}): {self.dirpath} is not the same folder on "
                "every machine; name a --trainer.default_root_dir that all of them share"
            )
        if self._restored is not None:
            for name, callback in _with_rank_state(trainer):
                if name in self._restored:
                    callback.load_rank_state(self._restored[name], pl_module.device)
            set_random_states(self._restored["random"])
            self._restored = None
        if trainer.is_global_zero:
            self._begin_at(step, trainer)

    def rolled_back(self, trainer: L.Trainer, left: int) -> None:
        """Save where the run goes on, and leave the checkpoints after it behind; called on every rank.

        Args:
            trainer: of the run, at the step that it was put back to.
            left: the step that it has left.
        """
        step = trainer.global_step
        if self._random is not None and self._random[0] == left:
            self._random = step, self._random[1]
        self._scores = {of: score for of, score in self._scores.items() if of <= step}
        self.save(trainer)
        if trainer.is_global_zero:
            if isinstance(trainer.strategy.checkpoint_io, CheckpointFiles):
                trainer.strategy.checkpoint_io.wait()
            self._set_aside_after(step)

    def _begin_at(self, step: int, trainer: L.Trainer) -> None:
        """Let the files of the folder end at ``step``."""
        folder = str(self.dirpath)
        if is_local(folder):
            for left in Path(folder).glob("*.tmp"):
                left.unlink()
        self._set_aside_after(step)
        loaded, files = str(trainer.ckpt_path or ""), trainer.strategy.checkpoint_io
        if isinstance(files, CheckpointFiles) and _folder_of(loaded) == _folder_of(os.path.join(folder, LAST)):
            files.link(loaded, os.path.join(folder, LAST))

    def _set_aside_after(self, step: int) -> None:
        """Rename the checkpoints of steps after ``step``: they belong to a part of the run that is left behind."""
        later = [self.format_checkpoint_name({"step": torch.tensor(of)}) for of in self._stored() if of > step]
        for path in (*later, *self._healthy_after(step)):
            name = set_aside(path)
            rank_zero_info(f"{path} is of a later step than {step}, where this run goes on; it is now {name}")

    def _healthy_after(self, step: int) -> list[str]:
        """Return the healthy checkpoint, if it is of a later step or cannot be read."""
        for path in list_checkpoints(str(self.dirpath)):
            if os.path.basename(path) == HEALTHY:
                try:
                    return [path] if read_checkpoint(path)["global_step"] > step else []
                except ValueError:
                    return [path]
        return []


def _folder_of(path: str) -> str:
    """Return the folder of a path or address in a form that can be compared; empty for no path."""
    return str(Path(path).resolve().parent) if is_local(path) else os.path.dirname(path)


def _with_rank_state(trainer: L.Trainer) -> list[tuple[str, Any]]:
    callbacks = cast(Any, trainer).callbacks
    return [(type(callback).__qualname__, callback) for callback in callbacks if hasattr(callback, "rank_state")]


def random_states() -> dict[str, Any]:
    """Return the global random states of this process (torch, CUDA, numpy, Python) in types of plain data."""
    kind, keys, position, has_gauss, gauss = cast("tuple[Any, ...]", np.random.get_state())
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put the global random states of this process where :func:`random_states` found them."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))


def align_counters(loops: dict[str, Any], steps: int, accumulate: int) -> None:
    """Put the counters of Lightning's loops between two optimiser steps of an endless stream.

    They count micro-batches, of which a step may now have another number, and a checkpoint may have been written while
    some were accumulated, or at the end of an "epoch" that an early stop had made. The state is that of a save in
    ``on_train_batch_end``, after which Lightning takes validation for done.

    Args:
        loops: of a checkpoint; changed in place.
        steps: optimiser steps done.
        accumulate: micro-batches of a step from now on.
    """
    if steps == 0:
        return
    fit, batches = loops["fit_loop"], steps * accumulate
    batch = {"ready": batches, "started": batches, "processed": batches, "completed": batches - 1}
    epoch = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    none = dict.fromkeys(batch, 0)
    fit["epoch_loop.batch_progress"] = {"total": batch, "current": dict(batch), "is_last_batch": False}
    fit["epoch_progress"] = {"total": epoch, "current": dict(epoch)}
    fit["epoch_loop.val_loop.batch_progress"] = {"total": none, "current": dict(none), "is_last_batch": False}
    fit["epoch_loop.state_dict"] = fit["epoch_loop.state_dict"] | {"_batches_that_stepped": steps - 1}
