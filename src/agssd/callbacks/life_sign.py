"""What the run is doing, in ``state.json`` of its directory, for ``agssd runs``."""

from __future__ import annotations

import logging
import subprocess
import threading
import traceback
from pathlib import Path
from typing import Any, ClassVar, cast

import lightning.pytorch as pl

import agssd
from agssd.callbacks.preemption import Preempted
from agssd.callbacks.standing import StandingCallback
from agssd.run import slurm
from agssd.run.state import State, now, this_process, write_state

_LOG = logging.getLogger(__name__)


class LifeSign(StandingCallback):
    """Writes ``DIR/state.json`` when the run starts, every ``every_s`` seconds and when it ends, on rank zero.

    A thread writes it, so a slow disk does not stop the training, and nobody waits for the device. How the run ended
    is one of ``finished``; ``preempted``, by SIGUSR1 or SIGTERM; ``stopped``, by a policy, with its report, or before
    its last step; ``interrupted``, by Ctrl-C; ``failed``, with the class of the exception and where it was raised: its
    message may name a file and is for the terminal. A process that is killed leaves ``running`` behind, and
    :func:`agssd.run.state.lives` tells that it is not.

    Args:
        every_s: seconds between two signs of life.
    """

    needs: ClassVar[type[Any]] = pl.LightningModule

    def __init__(self, every_s: float = 30.0) -> None:
        super().__init__()
        if every_s <= 0:
            raise ValueError(f"life_sign.every_s is {every_s}; give a positive number of seconds")
        self.every_s = every_s
        self._state: dict[str, Any] = {}
        self._directory = Path()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def usable(self, module: pl.LightningModule) -> bool:
        """Return True: every run has a state."""
        return True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Say that the run has started, and begin to give signs of life."""
        super().setup(trainer, pl_module, stage)
        if not self.active or self._thread is not None or not trainer.is_global_zero or cast(Any, trainer).fast_dev_run:
            return
        self._directory, self._ended = Path(trainer.default_root_dir), threading.Event()
        self._state = {
            "step": trainer.global_step,
            "max_steps": trainer.max_steps if trainer.max_steps > 0 else None,
            "agssd": agssd.__version__,
            "commit": commit_of_checkout(),
            "ranks": trainer.world_size,
            "slurm_job": slurm.job(),
            "restarts": slurm.restarts(),
            **this_process(),
            "every_s": self.every_s,
            "started": now(),
        }
        self._say("running")
        self._thread = threading.Thread(target=self._go_on_saying, daemon=True, name="agssd-life-sign")
        self._thread.start()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the step that the run starts at."""
        self._state["step"] = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the step; it is written with the next sign of life."""
        if self._thread is not None and trainer.global_step != self._state["step"]:
            self._state |= {"step": trainer.global_step, "stepped": now()}

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Say how the run has ended by itself."""
        reports = (getattr(callback, "stopped", "") for callback in cast(Any, trainer).callbacks)
        if report := next(filter(None, reports), ""):
            self._end(trainer, "stopped", report.replace(f"{self._directory}/", ""))
        elif 0 < trainer.max_steps > trainer.global_step:
            self._end(trainer, "stopped", "before its last step, as trainer.max_time or a callback demanded")
        else:
            self._end(trainer, "finished", "")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say what has ended the run."""
        if isinstance(exception, Preempted):
            self._end(trainer, "preempted", "told to stop, saved; the same command goes on")
        elif isinstance(exception, KeyboardInterrupt):
            self._end(trainer, "interrupted", "by Ctrl-C")
        else:
            self._end(trainer, "failed", place_of(exception))

    def failed(self, trainer: pl.Trainer, reason: str) -> None:
        """Say what ends the run where no exception does; ``reason`` holds no path."""
        self._end(trainer, "failed", reason)

    def _end(self, trainer: pl.Trainer, state: State, reason: str) -> None:
        if self._thread is None:
            return
        self._ended.set()
        self._thread = None
        self._state["step"] = trainer.global_step
        self._say(state, reason)

    def _say(self, state: State, reason: str = "") -> None:
        """Write the state; a disk that does not take it costs the state, not the run."""
        with self._lock:
            if state == "running" and self._ended.is_set():
                return
            try:
                write_state(self._directory, {"state": state, "reason": reason, **self._state, "written": now()})
            except OSError as error:
                _LOG.warning("the state of the run could not be written: %s", error)

    def _go_on_saying(self) -> None:
        while not self._ended.wait(self.every_s):
            self._say("running")


def place_of(exception: BaseException) -> str:
    """Return class and place of an exception, without its message: ``ValueError in data_modules/cache.py:120``."""
    package = Path(agssd.__file__).parent
    frames = traceback.extract_tb(exception.__traceback__)
    ours = [frame for frame in frames if package in Path(frame.filename).parents]
    where = f" in {Path(ours[-1].filename).relative_to(package)}:{ours[-1].lineno}" if ours else ""
    return f"{type(exception).__name__}{where}; its message is in the terminal or the log of the job"


def commit_of_checkout() -> str | None:
    """Return the git commit that agssd runs from, ``-dirty`` added where it was changed; None for an installed one."""
    root = Path(agssd.__file__).parents[2]
    if not (root / ".git").exists() or not (root / "src" / "agssd").is_dir():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
