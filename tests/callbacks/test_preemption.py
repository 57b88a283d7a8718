"""A signal ends a run after a whole optimiser step, with one checkpoint, and leaves no trace in the process."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from agssd.callbacks.ema_teacher import EMATeacher
from agssd.callbacks.preemption import EXIT_PREEMPTED, Preempted, Preemption
from agssd.callbacks.run_checkpoint import RunCheckpoint
from agssd.run.checkpoints import check_whole


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
    (action,) = map(json.loads, (tmp_path / "actions.jsonl").read_text().splitlines())
    assert (action["action"], action["step"], action["reason"]) == ("preemption", step, number.name)


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


@pytest.mark.parametrize("batch", [3, 2])
def test_preemption__told_in_the_last_step_it_validates_and_ends_as_usual(
    toy: Any, loader: Any, make_trainer: Callable[..., pl.Trainer], tmp_path: Path, batch: int
) -> None:
    class Validated(toy):  # type: ignore[misc]
        def validation_step(self, given: Any, batch_idx: int) -> None:
            saved.append((tmp_path / "checkpoints/step00000004.ckpt").is_file())
            self.log("val/x", 0.5)

    saved: list[bool] = []
    settings: dict[str, Any] = {"max_steps": 4, "enable_checkpointing": True, "limit_val_batches": 3}
    settings |= {"val_check_interval": 4, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    rhythm = RunCheckpoint(1000, monitor="val/x", dirpath=str(tmp_path / "checkpoints"), in_background=False)
    trainer = make_trainer(rhythm, Preemption(), **settings)
    module = told_at(Validated, batch, signal.SIGTERM)
    if batch == 2:
        with pytest.raises(Preempted) as stopped:
            trainer.fit(module, loader, loader)
        assert stopped.value.step == 3 and not saved
        return
    trainer.fit(module, loader, loader)
    assert trainer.state.finished and saved == [True, True, True]  # whatever the end takes, the steps are safe
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 4 and last["callbacks"]["RunCheckpoint"]["scores"] == {4: 0.5}


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


def signal_self(number: signal.Signals = signal.SIGUSR1) -> None:
    os.kill(os.getpid(), number)


def test_preemption__a_signal_inside_a_save_lets_it_finish_and_stops_after_the_next_step(
    toy: Any, loader: Any, make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    class Saved(toy):  # type: ignore[misc]
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            saves.append(checkpoint["global_step"])
            signal_self()

    saves: list[int] = []
    rhythm = RunCheckpoint(every_n_train_steps=2, dirpath=str(tmp_path / "checkpoints"))
    trainer = make_trainer(EMATeacher(), rhythm, Preemption(), max_steps=50, enable_checkpointing=True)
    with pytest.raises(Preempted) as stopped:  # the second save, the one asked for, is signalled too
        trainer.fit(Saved(), loader)
    assert stopped.value.step == 3 and saves == [2, 3]
    for step in saves:
        path = tmp_path / f"checkpoints/step{step:08d}.ckpt"
        check_whole(str(path))
        assert torch.load(path, weights_only=True)["global_step"] == step
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_preemption__further_signals_of_either_kind_change_nothing(
    toy: Any, loader: Any, make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    class Told(toy):  # type: ignore[misc]
        def training_step(self, given: Any, batch_idx: int) -> Any:
            if batch_idx >= 2:
                for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
                    signal_self(number)
            return super().training_step(given, batch_idx)

    trainer = make_trainer(checkpoints(tmp_path), Preemption(), max_steps=50, enable_checkpointing=True)
    with pytest.raises(Preempted) as stopped:
        trainer.fit(Told(), loader)
    assert stopped.value.step == 3
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 3


def test_preemption__a_signal_in_the_probe_stops_after_the_step_that_it_measures(
    scripted: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    probe, module, data = scripted(after=lambda: trainer.global_step == 2 and signal_self(), every_n_steps=2)
    trainer = make_trainer(probe, checkpoints(tmp_path), Preemption(), max_steps=50, enable_checkpointing=True)
    with pytest.raises(Preempted) as stopped:
        trainer.fit(module, data)
    assert stopped.value.step == 2 and probe.steps[-1] == 2
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize(("max_steps", "left_out"), [(50, True), (2, False)])
def test_preemption__a_probe_is_broken_off_between_volumes_unless_the_run_is_at_its_end(
    scripted: Callable[..., Any],
    make_trainer: Callable[..., pl.Trainer],
    tmp_path: Path,
    max_steps: int,
    left_out: bool,
) -> None:
    class Reading(type(scripted()[0])):  # type: ignore[misc]
        def _measure(self, trainer: Any, module: Any, *given: Any) -> dict[str, float]:
            volumes = SimpleNamespace(volumes=lambda: iter("abc"))
            for volume in self._volumes_until_told(volumes, trainer):
                read.append((trainer.global_step, volume))
                if read[-1] == (2, "b"):
                    signal_self()
            measured: dict[str, float] = super()._measure(trainer, module, *given)
            return measured

    read: list[tuple[int, str]] = []
    _, module, data = scripted()
    probe = Reading({}, every_n_steps=2, at_start=True)
    trainer = make_trainer(probe, checkpoints(tmp_path), Preemption(), max_steps=max_steps, enable_checkpointing=True)
    if left_out:
        with pytest.raises(Preempted):
            trainer.fit(module, data)
    else:
        trainer.fit(module, data)
    assert trainer.global_step == 2 and probe.steps == ([0] if left_out else [0, 2])
    assert read == [(0, each) for each in "abc"] + [(2, each) for each in ("ab" if left_out else "abc")]
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("accumulate", [1, 3])
def test_preemption__a_validation_is_broken_off_and_the_run_ends_as_if_it_had_not_been(
    toy: Any, make_trainer: Callable[..., pl.Trainer], tmp_path: Path, accumulate: int
) -> None:
    class Noisy(toy):  # type: ignore[misc]
        def training_step(self, given: Any, batch_idx: int) -> Any:
            return super().training_step([given[0] + torch.randn_like(given[0])], batch_idx)

        def validation_step(self, given: Any, batch_idx: int) -> None:
            torch.randn(3)  # a validation that draws, too
            validated.append((self.global_step, batch_idx))
            if (self.global_step, batch_idx) == told:
                signal_self()

    def fit(run: str, ckpt_path: str | None = None) -> pl.LightningModule:
        torch.manual_seed(1)
        trainer = make_trainer(
            EMATeacher(),
            checkpoints(tmp_path / run),
            Preemption(),
            max_steps=8,
            enable_checkpointing=True,
            accumulate_grad_batches=accumulate,
            limit_val_batches=4,
            val_check_interval=4 * accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
        )
        module = Noisy()
        same = DataLoader(TensorDataset(torch.ones(4096, 4)), batch_size=2)  # what tells steps apart is drawn
        trainer.fit(module, same, same, ckpt_path=ckpt_path, weights_only=True)
        return module

    told, validated = (-1, -1), []
    undisturbed = fit("undisturbed").state_dict()
    assert validated == [(step, batch) for step in (4, 8) for batch in range(4)]
    told = (4, 1)
    validated.clear()
    with pytest.raises(Preempted) as stopped:
        fit("told")
    assert stopped.value.step == 4 and validated == [(4, 0), (4, 1)]
    resumed = fit("told", str(tmp_path / "told/checkpoints/last.ckpt")).state_dict()
    assert validated[2:] == [(8, batch) for batch in range(4)]
    for name, tensor in undisturbed.items():
        assert torch.equal(resumed[name], tensor), name


def test_preemption__in_a_validation_between_micro_batches_the_step_is_finished_first(
    toy: Any, loader: Any, make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    class Validated(toy):  # type: ignore[misc]
        def validation_step(self, given: Any, batch_idx: int) -> None:
            signal_self()

    settings: dict[str, Any] = {"limit_val_batches": 2, "val_check_interval": 4, "check_val_every_n_epoch": None}
    settings |= {"max_steps": 50, "enable_checkpointing": True, "num_sanity_val_steps": 0}
    trainer = make_trainer(checkpoints(tmp_path), Preemption(), accumulate_grad_batches=3, **settings)
    with pytest.raises(Preempted) as stopped:
        trainer.fit(Validated(), loader, loader)
    assert stopped.value.step == 2
