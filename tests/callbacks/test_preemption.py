"""A signal ends a run after a whole optimiser step, with one checkpoint, and leaves no trace in the process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from agssd.callbacks.ema_teacher import EMATeacher
from agssd.callbacks.preemption import EXIT_PREEMPTED, Preempted, Preemption
from agssd.callbacks.run_checkpoint import RunCheckpoint


def checkpoints(folder: Path) -> RunCheckpoint:
    return RunCheckpoint(every_n_train_steps=1000, dirpath=str(folder / "checkpoints"))


def told_at(base: type[pl.LightningModule], batch: int, number: signal.Signals) -> Any:
    """Return a module that signals its own process in the middle of micro-batch ``batch``."""

    class Told(base):  # type: ignore[valid-type, misc]
        def training_step(self, given: Any, batch_idx: int) -> Any:
            if batch_idx == batch:
                os.kill(os.getpid(), number)
            return super().training_step(given, batch_idx)

    return Told()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize(("batch", "step"), [(0, 1), (4, 2), (5, 2), (6, 3)])
def test_preemption__ends_after_the_step_with_the_teacher_moved_and_one_checkpoint(
    toy: Any,
    loader: Any,
    make_trainer: Callable[..., pl.Trainer],
    tmp_path: Path,
    number: signal.Signals,
    batch: int,
    step: int,
) -> None:
    module = told_at(toy, batch, number)
    before = [signal.getsignal(each) for each in (signal.SIGUSR1, signal.SIGTERM)]
    settings = {"max_steps": 50, "accumulate_grad_batches": 3, "enable_checkpointing": True}
    trainer = make_trainer(EMATeacher(), checkpoints(tmp_path), Preemption(), **settings)
    with pytest.raises(Preempted) as stopped:
        trainer.fit(module, loader)
    assert stopped.value.code == EXIT_PREEMPTED == 75 and stopped.value.step == trainer.global_step == step
    assert len(module.momenta) == step
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", f"step{step:08d}.ckpt"]
    assert (folder / "last.ckpt").samefile(folder / f"step{step:08d}.ckpt")
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    assert saved["global_step"] == step
    for name, tensor in module.state_dict().items():
        assert torch.equal(saved["state_dict"][name], tensor), name
    assert [signal.getsignal(each) for each in (signal.SIGUSR1, signal.SIGTERM)] == before
    assert not list(tmp_path.glob("**/hpc_ckpt*"))


def test_preemption__figures_of_the_last_step_are_logged_and_no_validation_is_begun(
    toy: Any, loader: Any, make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    class Validated(toy):  # type: ignore[misc]
        def training_step(self, given: Any, batch_idx: int) -> Any:
            self.log("train/batch", float(batch_idx))
            return super().training_step(given, batch_idx)

        def validation_step(self, given: Any, batch_idx: int) -> None:
            validated.append(self.global_step)

    validated: list[int] = []
    module = told_at(Validated, 5, signal.SIGUSR1)
    settings: dict[str, Any] = {"max_steps": 50, "enable_checkpointing": True, "limit_val_batches": 1}
    settings |= {"val_check_interval": 3, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    trainer = make_trainer(checkpoints(tmp_path), Preemption(), **settings)
    with pytest.raises(Preempted):
        trainer.fit(module, loader, loader)
    assert trainer.global_step == 6 and validated == [3]
    assert (tmp_path / "metrics.csv").read_text().split()[-1].startswith("0,5,") or "5.0" in (
        tmp_path / "metrics.csv"
    ).read_text().split()[-1].split(",")


def test_preemption__a_run_at_its_end_ends_as_usual(
    toy: Any, loader: Any, make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    module = told_at(toy, 3, signal.SIGTERM)
    trainer = make_trainer(checkpoints(tmp_path), Preemption(), max_steps=4, enable_checkpointing=True)
    trainer.fit(module, loader)
    assert trainer.global_step == 4 and trainer.state.finished


def test_preemption__a_forked_worker_that_is_signalled_too_stops_nothing(
    toy: Any, loader: Any, make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    class Forking(toy):  # type: ignore[misc]
        def training_step(self, given: Any, batch_idx: int) -> Any:
            child = os.fork()
            if child == 0:
                os.kill(os.getpid(), signal.SIGUSR1)
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(0)
            ends.append(os.waitpid(child, 0)[1])
            return super().training_step(given, batch_idx)

    ends: list[int] = []
    trainer = make_trainer(checkpoints(tmp_path), Preemption(), max_steps=3, enable_checkpointing=True)
    trainer.fit(Forking(), loader)
    assert trainer.global_step == 3 and ends == [0, 0, 0]


def test_preemption__without_a_checkpoint_the_signals_are_left_alone(
    toy: Any, loader: Any, make_trainer: Callable[..., pl.Trainer]
) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        trainer = make_trainer(max_steps=3)
        trainer.callbacks.append(Preemption())  # type: ignore[attr-defined]
        trainer.fit(told_at(toy, 1, signal.SIGUSR1), loader)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert trainer.global_step == 3 and heard == [signal.SIGUSR1]
