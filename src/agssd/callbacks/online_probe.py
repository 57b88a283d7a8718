"""What the frozen encoder is worth on labelled volumes, measured while it trains."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from typing import Any, ClassVar, cast

import lightning.pytorch as pl
import torch

from agssd.callbacks.best_checkpoint import PREFIX, BestCheckpoint
from agssd.callbacks.standing import StandingCallback, log_figures
from agssd.callbacks.throughput import StepClock, outside_training
from agssd.evaluation.probe import (
    READOUTS,
    ProbeData,
    ReadoutName,
    all_finite,
    figure_names,
    kinds_of,
    possible_readouts,
    run_readouts,
)
from agssd.evaluation.probe_features import ProbeVolume, encode
from agssd.models.backbone import Backbone, build_fresh
from agssd.run.stop_signals import STOP
from agssd.sharding import whole
from agssd.types import HasBackbone, Size

_LOG = logging.getLogger(__name__)


class _BrokenOff(Exception):
    """The run is told to stop."""


class OnlineProbe(StandingCallback):
    """Probes the encoder that would be kept (the teacher's where there is one) every ``every_n_steps`` optimiser steps.

    Also before the first step and after the last one, however few there are. Keys: ``probe/<figure>`` for each figure
    of :mod:`agssd.evaluation.probe`, NaN where the encoder's features are not finite; ``probe/step``, how many
    optimiser steps it has had; ``probe/held_out_subjects`` and ``probe/held_out_seen``, how many of them are in this
    pretraining; ``probe/seconds`` of this probe and ``probe/time_share``, what share of the time a probe takes if
    there is one every ``every_n_steps`` steps as long as those since the last one. The same settings of
    ``agssd probe`` give the same figures of the same checkpoint.

    A frozen copy is probed, so neither the module nor its random numbers notice; in the run's precision (bf16 or else
    float32). Rank 0 measures, the others wait and get its figures. The best weights are kept as ``best.ckpt``, see
    :class:`agssd.callbacks.best_checkpoint.BestCheckpoint`.

    Without ``cache`` the training cache's own cases with a label map or a class serve: the split "train" is learnt from
    and "val", which pretraining does not see, measured on. A training cache without either is not probed, nor are
    several.

    Source: docs/method.md (d). Defaults: ours.

    Args:
        cache: labelled cache; null for the training cache.
        every_n_steps: optimiser steps between probes.
        at_start: also probe the untrained encoder, so that what cannot work stops the run before its first step.
        at_end: also probe after the last step where the interval does not end there.
        readouts: which; null for every one that the labels allow.
        num_folds: measure by folds of the split "train" instead of on "val". Its subjects are in pretraining if the
            cache is the training cache, which ``probe/held_out_seen`` says.
        num_subjects: at most so many labelled subjects (per fold) to learn from.
        num_held_out: at most so many subjects (per fold) to measure on.
        window_vox: window, the size of view in pretraining; null for 4 patches per axis.
        overlap: of windows.
        max_vox: at most so many voxels per axis, from the middle of the volume; null for whole volumes.
        linear_steps: optimiser steps of linear segmentation.
        max_time_share: ``probe/time_share`` above which one sentence says so, and which interval would do.
    """

    needs: ClassVar[type[Any]] = HasBackbone

    def __init__(
        self,
        cache: str | None = None,
        every_n_steps: int = 1000,
        at_start: bool = True,
        at_end: bool = True,
        readouts: list[ReadoutName] | None = None,
        num_folds: int | None = None,
        num_subjects: int = 16,
        num_held_out: int = 16,
        window_vox: Size | None = None,
        overlap: float = 0.0,
        max_vox: int | None = None,
        linear_steps: int = 60,
        max_time_share: float = 0.02,
    ) -> None:
        super().__init__()
        for name, value in (("every_n_steps", every_n_steps), ("linear_steps", linear_steps), ("max_vox", max_vox)):
            if value is not None and value < 1:
                raise ValueError(f"online_probe.{name} is {value}; it must be at least 1")
        if readouts is not None and not readouts:
            raise ValueError("online_probe.readouts is empty; name at least one, or null for all that the labels allow")
        self.cache = cache
        self.every_n_steps = every_n_steps
        self.at_start = at_start
        self.at_end = at_end
        self.readouts = readouts
        self.num_folds = num_folds
        self.num_subjects = num_subjects
        self.num_held_out = num_held_out
        self.window_vox = window_vox
        self.overlap = overlap
        self.max_vox = max_vox
        self.linear_steps = linear_steps
        self.max_time_share = max_time_share
        self._data: ProbeData | None = None
        self._chosen: list[ReadoutName] = []
        self._step = 0
        self._probed = -1  # optimiser step of the last probe
        self._clock = StepClock()  # of the steps since then
        self._warned = False

    # ---------------------------------------------------------------- before

    def check_data(self, trainer: pl.Trainer, pl_module: pl.LightningModule, data: Any) -> None:
        """Open the labelled cache, whose voxels are read later; refuse what no probe could serve.

        Raises:
            ValueError: for an unusable ``cache``, readouts that its labels do not allow, a window that does not fit the
                encoder, or a checkpoint that would be chosen by a figure that is not measured, not measured at its
                step, or is best where it is small.
        """
        self._data = self._open(data) if self.active else None
        if self._data is not None:
            possible = possible_readouts(self._data)
            self._chosen = possible if self.readouts is None else self.readouts
            if missing := set(self._chosen) - set(possible):
                raise ValueError(
                    f"online_probe.readouts asks for {sorted(missing)}, but the labels of the cache allow "
                    f"{possible or 'none'}"
                )
            self._window(self._encoder_of(pl_module))
        self._check_monitors(trainer)

    def _open(self, data: Any) -> ProbeData | None:
        if not hasattr(data, "probe_set"):
            if self.cache is not None:
                raise ValueError(
                    f"online_probe.cache is {self.cache}, but {type(data).__name__} cannot open it; use "
                    "agssd.data_modules.pretrain.PretrainDataModule, or leave it out"
                )
            return None
        found: ProbeData | None = data.probe_set(
            self.cache,
            self.num_folds,
            self.num_subjects,
            self.num_held_out,
            self.max_vox,
            kinds_of(READOUTS if self.readouts is None else self.readouts),
        )
        return found

    def _check_monitors(self, trainer: pl.Trainer) -> None:
        known = [] if self._data is None else [PREFIX + name for name in figure_names(self._data, self._chosen)]
        for checkpoint in cast(Any, trainer).checkpoint_callbacks:
            if isinstance(checkpoint, BestCheckpoint):
                checkpoint.choose_by(known)
                continue
            monitor = getattr(checkpoint, "monitor", None) or ""
            if not monitor.startswith(PREFIX):
                continue
            if monitor not in known:
                raise ValueError(
                    f"checkpoint.monitor is {monitor}, which is not measured in this run; "
                    + (
                        f"choose one of {', '.join(known)}"
                        if known
                        else "there is no labelled cache: give one with --online_probe.cache"
                    )  # fmt: skip
                )
            if checkpoint.mode != "max":
                raise ValueError(
                    f"checkpoint.monitor is {monitor}, of which more is better: set checkpoint.mode to max"
                )
            if checkpoint._every_n_train_steps % self.every_n_steps:
                raise ValueError(
                    f"checkpoint.every_n_train_steps is {checkpoint._every_n_train_steps} and "
                    f"online_probe.every_n_steps {self.every_n_steps}: a checkpoint would be judged by a probe of "
                    "earlier weights; make the first a multiple of the second"
                )

    @staticmethod
    def _encoder_of(module: pl.LightningModule) -> Backbone:
        return cast(Backbone, cast(HasBackbone, module).backbone)

    def _window(self, encoder: Backbone) -> Size:
        patch = encoder.patch_size
        window = self.window_vox or tuple(4 * n for n in patch)
        if any(w < p or w % p for w, p in zip(window, patch, strict=True)):
            raise ValueError(
                f"online_probe.window_vox is {list(window)}, no multiple of the encoder's patch {list(patch)}"
            )
        return window

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check what the CLI has checked before, for runs without it."""
        self.check_data(trainer, pl_module, getattr(trainer, "datamodule", None))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Probe the untrained encoder if asked to."""
        self._step = trainer.global_step
        self._probed, self._warned = -1, False
        self._clock.running = False  # starts with the first step's end: that step compiles and fills caches
        if self._data is not None and self.at_start and trainer.global_step == 0:
            self._probe(trainer, pl_module)

    # ----------------------------------------------------------------- while

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Probe after every so many steps."""
        if self._data is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step % self.every_n_steps == 0:
            self._probe(trainer, pl_module)
        if not self._clock.running:
            self._clock.start(self._step, pl_module.device)

    def on_step_restored(self, step: int) -> None:
        """Begin a new interval."""
        super().on_step_restored(step)
        self._clock.running = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._clock.pause(pl_module.device)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock again."""
        self._clock.resume()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Probe the last weights, unless they were."""
        if self._data is not None and self.at_end and self._probed != self._step:
            self._probe(trainer, pl_module)

    def _probe(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        steps_s, steps = self._clock.read(self._step, module.device) if self._clock.running else (0.0, 0)
        started = time.perf_counter()
        with outside_training(trainer, module.device):
            figures = self._everywhere(trainer, module)
        if not figures:
            return
        seconds = time.perf_counter() - started
        times = {"step": float(self._step), "seconds": seconds}
        if steps:
            times["time_share"] = seconds / (seconds + self.every_n_steps * steps_s / steps)
        times = trainer.strategy.broadcast(times)
        log_figures(trainer, {PREFIX + name: value for name, value in (figures | times).items()})
        for checkpoint in cast(Any, trainer).checkpoint_callbacks:
            if isinstance(checkpoint, BestCheckpoint):
                checkpoint.probed(self._step)
        self._probed = self._step
        if self._clock.running:
            self._clock.start(self._step, module.device)
        if times.get("time_share", 0.0) > self.max_time_share and not self._warned and trainer.is_global_zero:
            self._warned = True
            wanted = seconds * (1 / self.max_time_share - 1) / (steps_s / steps)
            _LOG.warning(
                "step %d: a probe took %.1f s, %.1f %% of the time with one every %d steps of %.2f s and more than "
                "%.1f %%; set online_probe.every_n_steps to about %d, or probe fewer subjects or readouts",
                *(self._step, seconds, 100 * times["time_share"], self.every_n_steps, steps_s / steps),
                *(100 * self.max_time_share, math.ceil(wanted / 100) * 100),
            )

    def _everywhere(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
        """Return the figures that rank 0 measures, on every rank; none if it was told to stop meanwhile."""
        figures: dict[str, float] | None = None
        failure: Exception | None = None
        weights = whole(self._encoder_of(module).state_dict(), trainer.is_global_zero)
        if trainer.is_global_zero:
            try:
                figures = self._measure(trainer, module, weights)
            except _BrokenOff:
                figures = {}
                _LOG.warning("step %d: the run is told to stop; the probe is broken off and left out", self._step)
            except Exception as error:  # the other ranks must not wait for ever
                failure = error
        told = trainer.strategy.broadcast((figures, None if failure is None else str(failure)))
        if failure is not None:
            raise failure
        figures, reason = told
        if figures is None:
            raise RuntimeError(f"the probe failed on rank 0: {reason}")
        return figures

    def _volumes_until_told(self, data: ProbeData, trainer: pl.Trainer) -> Iterator[ProbeVolume]:
        """Yield the volumes; a run at its end takes the time."""
        for volume in data.volumes():
            if STOP.received is not None and not 0 < trainer.max_steps <= trainer.global_step:
                raise _BrokenOff
            yield volume

    @torch.no_grad()
    def _measure(self, trainer: pl.Trainer, module: pl.LightningModule, weights: dict[str, Any]) -> dict[str, float]:
        """Return the figures; the module, its mode and every random state stay as they are."""
        assert self._data is not None
        frozen = build_fresh(self._encoder_of(module).config)
        frozen.load_state_dict(weights)
        devices = [module.device] if module.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.autocast(module.device.type, enabled=False):
            features = encode(
                frozen.to(module.device),
                self._volumes_until_told(self._data, trainer),
                self._window(frozen),
                self.overlap,
                torch.bfloat16 if str(trainer.precision).startswith("bf16") else None,
            )
            del frozen
            if all_finite(features):
                found = run_readouts(features, self._data, self._chosen, self.linear_steps, module.device).figures
            else:  # the run has diverged, which is for its own alarms to say; a probe does not end it
                _LOG.warning("step %d: the encoder's features are not finite, nor are the probe's figures", self._step)
                found = dict.fromkeys(figure_names(self._data, self._chosen), math.nan)
        seen = self._data.held_out_seen(cast(Any, trainer).datamodule.seen)
        found["held_out_subjects"] = float(self._data.num_subjects)
        return found if seen is None else found | {"held_out_seen": float(seen)}
