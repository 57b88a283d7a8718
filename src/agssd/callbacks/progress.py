"""How far the run is: a bar in a terminal, plain lines in the log of a job."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from typing import Any, Literal, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

_BAR_S = 5.0  # seconds between two looks of the bar at the figures, which wait for the device
Mode = Literal["auto", "rich", "lines", "off"]


class Progress:
    """Settings of the progress report, the ``progress`` group of a configuration.

    Either way only rank 0 reports: step, loss, samples/s, data wait, time left, and whether alarms of the collapse
    monitor stand. ``trainer.enable_progress_bar`` false switches it off too, and a bar in ``trainer.callbacks`` takes
    its place.

    Args:
        mode: ``rich``, a bar that is drawn over and over; ``lines``, one line every so often without carriage returns;
            ``auto``, the bar where stdout is a terminal and lines elsewhere, as in the log of a job; ``off``.
        every_s: seconds between two lines.
    """

    def __init__(self, mode: Mode = "auto", every_s: float = 30.0) -> None:
        """Keep the settings.

        Raises:
            ValueError: for a negative ``every_s``.
        """
        if every_s < 0:
            raise ValueError(f"progress.every_s is {every_s}; give a number of seconds")
        self.mode = mode
        self.every_s = every_s

    def callback(self) -> ProgressBar | None:
        """Return what reports, None for nothing."""
        mode = self.mode
        if mode == "auto":
            mode = "rich" if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb" else "lines"
        if mode == "off":
            return None
        return RichProgress() if mode == "rich" else LineProgress(self.every_s)


class Figures:
    """What a report says besides the step; looks at the metrics, and so waits for the device, only when it is asked."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque(maxlen=16)

    def restart(self) -> None:
        """Forget how fast the run was."""
        self._points.clear()

    def __call__(self, trainer: pl.Trainer) -> dict[str, str]:
        """Return the figures by name, those that are known."""
        step = trainer.global_step
        if self._points and step < self._points[-1][1]:  # rolled back
            self.restart()
        self._points.append((time.monotonic(), step))
        known, shown = trainer.callback_metrics, {}
        if "train/loss" in known:
            shown["loss"] = f"{float(known['train/loss']):.4g}"
        (first_s, first), (last_s, last) = self._points[0], self._points[-1]
        pace = (last - first) / (last_s - first_s) if last > first and last_s > first_s else None
        batch = getattr(getattr(trainer, "datamodule", None), "global_batch_size", None)
        if "throughput/samples_per_s" in known:
            shown["samples/s"] = f"{float(known['throughput/samples_per_s']):.3g}"
        elif pace is not None and isinstance(batch, int):
            shown["samples/s"] = f"{pace * batch:.3g}"
        if "throughput/data_wait" in known:
            shown["data wait"] = f"{100 * float(known['throughput/data_wait']):.0f} %"
        if pace is not None and trainer.max_steps > 0:
            shown["left"] = duration((trainer.max_steps - step) / pace)
        if "collapse/alarms" in known:
            alarms = int(known["collapse/alarms"])
            shown["collapse"] = f"{alarms} alarm(s)" if alarms else "ok"
        return shown


class LineProgress(ProgressBar):
    """Prints a line every ``every_s`` seconds, at the first and the last step, and after each validation.

    ``step 1200/100000 (1.2 %) loss 3.21 812 samples/s data wait 3 % left 3 h 12 min collapse ok``

    Args:
        every_s: seconds between two lines.
    """

    def __init__(self, every_s: float = 30.0) -> None:
        super().__init__()
        self.every_s = every_s
        self._figures = Figures()
        self._silent = False
        self._last_s = 0.0
        self._step = self._printed = -1

    def disable(self) -> None:
        """Print nothing; Lightning calls it on every rank but the first."""
        self._silent = True

    def enable(self) -> None:
        """Print again."""
        self._silent = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Count the seconds from here."""
        super().setup(trainer, pl_module, stage)
        self._last_s = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure from the step that the run starts at; its first line comes with its first step."""
        self._step, self._printed, self._last_s = trainer.global_step, -1, -float("inf")
        self._figures.restart()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print if a line is due and this batch completed an optimiser step."""
        if self._silent or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._is_due():
            self._print_step(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the last step."""
        if not self._silent and self._printed != self._step:
            self._print_step(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the figures of a validation while training."""
        if self._silent or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        found = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")}
        if found:
            figures = " ".join(f"{name} {value:.4g}" for name, value in sorted(found.items()))
            self._print(f"{step_of(trainer)} validation {figures}")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *given: Any, **more: Any
    ) -> None:
        """Print the batch if a line is due."""
        self._print_batch("validation", given[2])

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *given: Any, **more: Any) -> None:
        """Print the batch if a line is due."""
        self._print_batch("test", given[2])

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *given: Any, **more: Any
    ) -> None:
        """Print the batch if a line is due."""
        self._print_batch("predict", given[2])

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print what a module wants to say."""
        print(*args, **kwargs)

    def _is_due(self) -> bool:
        return time.monotonic() - self._last_s >= self.every_s

    def _print_batch(self, what: str, batch_idx: int) -> None:
        if not self._silent and self._is_due():
            self._print(f"{what}: {batch_idx + 1} batches done")

    def _print_step(self, trainer: pl.Trainer) -> None:
        self._printed = self._step
        units_last = ("samples/s",)
        figures = self._figures(trainer).items()
        self._print(" ".join([step_of(trainer), *(f"{v} {n}" if n in units_last else f"{n} {v}" for n, v in figures)]))

    def _print(self, line: str) -> None:
        self._last_s = time.monotonic()
        print(line, flush=True)


class RichProgress(RichProgressBar):
    """Lightning's bar, counting optimiser steps, with the figures of the run.

    Lightning's own looks at the logged metrics after every batch, for which the host waits for the device; this one
    does every few seconds.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._figures = Figures()
        self._shown: dict[str, str] = {}
        self._looked_s = -float("inf")

    @property
    def total_train_batches(self) -> int | float:
        """Return the optimiser steps of the run, the batches of an epoch where it has no length."""
        return self.trainer.max_steps if self.trainer.max_steps > 0 else super().total_train_batches

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        """Return description, bar, count and elapsed time; Lightning adds the figures."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

        return [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure from here."""
        self._figures.restart()
        self._looked_s = -float("inf")
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        if self.is_enabled and self.train_progress_bar_id is None:
            self._initialize_train_progress_bar_id()
        done = trainer.global_step if trainer.max_steps > 0 else batch_idx + 1
        self._update(self.train_progress_bar_id, done)
        self._update_metrics(trainer, pl_module)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return the figures of the run, as they were at most a few seconds ago."""
        if time.monotonic() - self._looked_s >= _BAR_S:
            self._shown = self._figures(trainer)
            self._looked_s = time.monotonic()
        return cast(dict[str, Any], self._shown)

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training  "


def step_of(trainer: pl.Trainer) -> str:
    """Return ``step 12/100 (12.0 %)``."""
    step, total = trainer.global_step, trainer.max_steps
    return f"step {step}/{total} ({100 * step / total:.1f} %)" if total > 0 else f"step {step}"


def duration(seconds: float) -> str:
    """Return a time in its two largest units, such as ``3 h 12 min``."""
    minutes = int(seconds // 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
