"""What ``state.json`` says after each way in which a run can end, and while it lives."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from agssd.callbacks.actions import stop_run
from agssd.callbacks.life_sign import LifeSign, commit_of_checkout, place_of
from agssd.callbacks.preemption import Preempted, Preemption
from agssd.callbacks.run_checkpoint import RunCheckpoint
from agssd.run.state import STATE, lives, read_state


class At(pl.Callback):
    """Does something at the end of a step."""

    def __init__(self, step: int, what: Callable[[pl.Trainer], None]) -> None:
        self.step, self.what = step, what
        self.stopped = ""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.what(trainer)


def state_of(trainer: pl.Trainer) -> dict[str, Any]:
    state = read_state(Path(trainer.default_root_dir))
    assert state is not None
    return state


def test_life_sign__running_then_finished(toy: Any, loader: Any, make_trainer: Any) -> None:
    seen: list[dict[str, Any]] = []

    def look(trainer: pl.Trainer) -> None:
        limit = time.monotonic() + 60
        while (state := state_of(trainer))["step"] != 2 and time.monotonic() < limit:
            time.sleep(0.01)
        seen.append(state)

    trainer = make_trainer(LifeSign(every_s=0.02), At(2, look), max_steps=4)
    trainer.fit(toy(), loader)
    (state,) = seen
    assert state["state"] == "running" and state["step"] == 2 and state["max_steps"] == 4
    assert state["pid"] == os.getpid() and lives(state, 1e6)
    state = state_of(trainer)
    assert (state["state"], state["step"], state["reason"]) == ("finished", 4, "")
    written = (Path(trainer.default_root_dir) / STATE).read_bytes()
    time.sleep(0.1)
    assert (Path(trainer.default_root_dir) / STATE).read_bytes() == written  # the thread has ended with the run
    assert str(trainer.default_root_dir).encode() not in written


def test_life_sign__report_of_a_policy(toy: Any, loader: Any, make_trainer: Any) -> None:
    def stop(trainer: pl.Trainer) -> None:
        policy.stopped = f"uniform; see {trainer.default_root_dir}/captures/a.pt"
        stop_run(trainer, policy.stopped)

    policy = At(3, stop)
    trainer = make_trainer(LifeSign(), policy, max_steps=9)
    trainer.fit(toy(), loader)
    state = state_of(trainer)
    assert (state["state"], state["step"], state["reason"]) == ("stopped", 3, "uniform; see captures/a.pt")


def test_life_sign__end_before_the_last_step_is_not_called_finished(toy: Any, loader: Any, make_trainer: Any) -> None:
    trainer = make_trainer(LifeSign(), At(3, lambda trainer: setattr(trainer, "should_stop", True)), max_steps=9)
    trainer.fit(toy(), loader)
    assert state_of(trainer)["state"] == "stopped" and "before its last step" in state_of(trainer)["reason"]


def test_life_sign__exception_is_named_without_its_message(toy: Any, loader: Any, make_trainer: Any) -> None:
    def fail(trainer: pl.Trainer) -> None:
        raise OSError("DOE_JOHN.nii is gone")

    trainer = make_trainer(LifeSign(), At(2, fail), max_steps=9)
    with pytest.raises(OSError, match="DOE"):
        trainer.fit(toy(), loader)
    state = state_of(trainer)
    assert (state["state"], state["step"]) == ("failed", 2) and state["reason"].startswith("OSError")
    assert "DOE" not in str(state)


def test_life_sign__preempted(toy: Any, loader: Any, make_trainer: Any, tmp_path: Path) -> None:
    checkpoint = RunCheckpoint(every_n_train_steps=1000, dirpath=str(tmp_path / "checkpoints"))
    signalled = At(2, lambda trainer: os.kill(os.getpid(), signal.SIGUSR1))
    settings = {"max_steps": 50, "enable_checkpointing": True}
    trainer = make_trainer(LifeSign(), signalled, checkpoint, Preemption(), **settings)
    with pytest.raises(Preempted) as stopped:
        trainer.fit(toy(), loader)
    state = state_of(trainer)
    assert (state["state"], state["step"]) == ("preempted", stopped.value.step)


def test_life_sign__nothing_is_written_by_a_trial_or_outside_fit(
    toy: Any, loader: Any, make_trainer: Any, tmp_path: Path
) -> None:
    make_trainer(LifeSign(), fast_dev_run=True).fit(toy(), loader)
    assert not list(tmp_path.rglob(STATE))


def test_place_of__names_the_last_place_in_the_package() -> None:
    with pytest.raises(ValueError) as caught:
        LifeSign(every_s=-1)
    assert place_of(caught.value).startswith("ValueError in callbacks/life_sign.py:")


def test_commit__is_that_of_the_checkout_or_none() -> None:
    commit = commit_of_checkout()
    assert commit is None or len(commit.removesuffix("-dirty")) >= 7
