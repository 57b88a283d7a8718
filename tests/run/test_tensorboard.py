"""TensorBoard's files and ``metrics.csv`` hold the same scalars of the same steps, also after a kill and a resume."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agssd.callbacks.standing import log_figures
from agssd.run import tensorboard
from agssd.run.metrics_file import RunCSVLogger
from agssd.run.tensorboard import RunTensorBoardLogger


def of_tensorboard(directory: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def of_csv(directory: Path) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    with (directory / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for name in (name for name, cell in row.items() if cell and name != "step"):
                curves.setdefault(name, []).append((int(row["step"]), float(row[name])))
    return curves


def assert_same(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Compare every scalar and step; TensorBoard keeps float32."""
    table, events = of_csv(directory), of_tensorboard(directory)
    assert set(table) == set(events)
    for name, curve in table.items():
        steps = [step for step, _ in events[name]]
        assert steps == [step for step, _ in curve], name
        assert name == "epoch" or steps == sorted(set(steps)), name  # Lightning sends the epoch with a validation too
        expected = np.array([value for _, value in curve], np.float32)
        np.testing.assert_array_equal(np.array([value for _, value in events[name]], np.float32), expected, name)
    return table


class Noisy(BoringModel):
    """Logs figures of every kind: a step's, a validation's, another rhythm's, and one that is not finite."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        step = super().training_step(batch, batch_idx)
        self.log("train/loss", step["loss"])
        return step

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step % 3 == 0:
            log_figures(self.trainer, {"probe/seconds": 1 / (1 + self.global_step), "probe/none": math.nan})

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", super().validation_step(batch, batch_idx)["x"])


def train(directory: Path, steps: int, resumed_at: int | None = None) -> None:
    loggers = [RunCSVLogger(directory), RunTensorBoardLogger(directory)]
    for logger in loggers if resumed_at is not None else ():
        logger.rewind(resumed_at)
    settings: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(
        default_root_dir=directory, logger=loggers, max_steps=steps, log_every_n_steps=1, limit_val_batches=2,
        val_check_interval=4, check_val_every_n_epoch=None, enable_checkpointing=False, num_sanity_val_steps=0,
        **settings,
    )  # fmt: skip
    if resumed_at is not None:
        progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
        progress.total.ready = progress.total.completed = resumed_at
        trainer.fit_loop.epoch_loop._batches_that_stepped = resumed_at
    trainer.fit(Noisy())


def test_tensorboard__holds_what_metrics_hold(tmp_path: Path) -> None:
    train(tmp_path, 12)
    table = assert_same(tmp_path)
    assert {"train/loss", "val/loss", "epoch", "probe/seconds", "probe/none"} <= set(table)
    assert [step for step, _ in table["train/loss"]] == list(range(12))
    assert all(math.isnan(value) for _, value in of_tensorboard(tmp_path)["probe/none"])


def test_tensorboard__after_a_resume_no_step_is_there_twice_and_none_is_missing(tmp_path: Path) -> None:
    train(tmp_path, 9)
    train(tmp_path, 14, resumed_at=6)
    table = assert_same(tmp_path)
    assert [step for step, _ in table["train/loss"]] == list(range(14))
    train(tmp_path, 5, resumed_at=0)  # killed before its first checkpoint
    assert [step for step, _ in assert_same(tmp_path)["train/loss"]] == list(range(5))


def test_tensorboard__a_killed_run_has_lost_nothing(tmp_path: Path) -> None:
    loggers: list[Any] = [RunCSVLogger(tmp_path), RunTensorBoardLogger(tmp_path)]
    for step in range(25):
        for logger in loggers:
            logger.log_metrics({"train/loss": 1.0 / (step + 1)}, step=step)
    assert len(assert_same(tmp_path)["train/loss"]) == 25  # read without finalize or close


def test_tensorboard__hyperparameters_hold_no_path(tmp_path: Path) -> None:
    logger = RunTensorBoardLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.25, "data": {"cache": "/scans/DOE_JOHN.h5"}})
    logger.log_metrics({"train/loss": 1.0}, step=0)
    logger.finalize("success")
    texts = [path.read_bytes() for path in (tmp_path / "tensorboard").iterdir()]
    assert any(b"0.25" in text for text in texts) and not any(b"DOE" in text for text in texts)
    assert set(of_tensorboard(tmp_path)) == {"train/loss"}


def test_tensorboard__not_installed_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"agssd\[tensorboard\]"):
        RunTensorBoardLogger(tmp_path)
