"""The monitoring row of `agssd bench-speed`: what is in it, and that it measures what it says."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from agssd.callbacks.best_checkpoint import BestCheckpoint
from agssd.callbacks.collapse_monitor import CollapseMonitor
from agssd.callbacks.ema_teacher import EMATeacher
from agssd.callbacks.mask_ratio import MaskRatioSchedule
from agssd.callbacks.online_probe import OnlineProbe
from agssd.callbacks.throughput import Throughput
from agssd.callbacks.view_panels import ViewPanels
from agssd.commands import _bench_monitoring as monitoring
from agssd.commands._bench_probe import write_cache
from agssd.commands._bench_turns import HookClock, Turns
from agssd.lightning_cli import AgssdCLI
from agssd.models.step_guard import NoStepGuard, StepGuard
from agssd.run.directory import SaveRunConfig
from agssd.run.wandb import QuietWandbLogger

CPU = torch.device("cpu")
SCHEDULES = {EMATeacher, MaskRatioSchedule}
# what has rows of its own, and what acts before the first step only
ELSEWHERE = {OnlineProbe, BestCheckpoint, SaveRunConfig}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    write_cache(tmp_path / "bench.h5")
    return tmp_path / "bench.h5"


class Built(AgssdCLI):
    """``agssd fit``, built and not run."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def kinds(trainer: Any) -> set[type]:
    """Return the classes of a trainer's callbacks, without what makes it take turns."""
    return {type(callback) for callback in trainer.callbacks} - {Turns}


def test_sides__watched_has_all_that_a_run_of_fit_has_and_bare_none(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = {"accelerator": "cpu", "max_steps": 4, "default_root_dir": str(tmp_path / "run")}
    trainer |= {"enable_model_summary": False}
    config = {
        "trainer": trainer,
        "model": {"class_path": "agssd.methods.dino.DINO"},
        "backbone": {"class_path": "agssd.models.vit.ViT", "init_args": {"patch_size": 8, "depth": 2}},
        "views": {"class_path": "agssd.transforms.crops.OverlapCrops"},
        "data": {
            "class_path": "agssd.data_modules.pretrain.PretrainDataModule",
            "init_args": {"cache": str(cache), "parent_vox": [40, 56, 40], "global_batch_size": 2},
        },
        "wandb": {"mode": "offline"},  # the default where there is no account
        "progress": {"mode": "lines"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    run = Built(["fit", "--config", str(tmp_path / "run.yaml")]).trainer
    _, watched, bare = monitoring.sides(CPU, cache, tmp_path, 4)
    assert kinds(watched.trainer) == kinds(run) - ELSEWHERE
    assert kinds(bare.trainer) == SCHEDULES < kinds(watched.trainer)
    for kind in (CollapseMonitor, Throughput, ViewPanels):  # at the rhythm of a run that says nothing of it
        rhythms = {c.every_n_steps for t in (run, watched.trainer) for c in t.callbacks if type(c) is kind}
        assert rhythms == {kind().every_n_steps}
    assert watched.trainer.log_every_n_steps == run.log_every_n_steps
    assert [type(logger) for logger in run.loggers] == [type(one).__mro__[1] for one in watched.trainer.loggers]
    assert QuietWandbLogger in [type(logger) for logger in run.loggers], "W&B is on by default"
    assert bare.trainer.loggers == []
    assert isinstance(watched.module.guard, StepGuard) and not isinstance(watched.module.guard, NoStepGuard)
    assert type(bare.module.guard) is NoStepGuard
    for first, second in zip(watched.module.parameters(), bare.module.parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.slow
def test_time_monitoring__both_sides_learn_the_same_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_WARM_UP", 1), ("_TURN", 2), ("_REST_S", 0.2), ("_LOG_EVERY", 1)):
        monkeypatch.setattr(monitoring, name, value)
    built: list[Any] = []
    sides = monitoring.sides
    monkeypatch.setattr(monitoring, "sides", lambda *given: built.append(sides(*given)) or built[-1])
    shown = CollapseMonitor.on_train_batch_end

    def slow(self: CollapseMonitor, trainer: Any, *given: Any) -> None:
        shown(self, trainer, *given)
        end = time.thread_time() + 0.2
        while time.thread_time() < end:
            pass

    monkeypatch.setattr(CollapseMonitor, "on_train_batch_end", slow)
    found = monitoring.time_monitoring(1, CPU, tmp_path, steps=3)
    assert (
        len(found.pairs) == len(found.cpu_pairs) == 1
        and len(built) == 2
        and all(second > 0 for pair in found.pairs for second in pair)
    )
    parts = {"CollapseMonitor", "NonFinite", "ViewPanels", "step guard", "metrics.csv", "W&B", "threads"}
    assert parts <= found.shares.keys() and found.shares["W&B"] > 0
    for first in (0, 1):
        assert list((tmp_path / f"round0_{first}/watched/wandb").glob("offline-run-*/*.wandb")), "W&B did log"
    assert "EMATeacher" not in found.shares and max(found.shares, key=found.shares.__getitem__) == "CollapseMonitor"
    for clock, watched, bare in built:
        assert clock.seconds["CollapseMonitor"] > 3 * 0.2
        assert watched.trainer.global_step == bare.trainer.global_step == 4
        for name, tensor in watched.module.state_dict().items():
            assert torch.equal(tensor, bare.module.state_dict()[name]), name


def test_rhythm__is_a_multiple_of_every_report() -> None:
    for kind in (CollapseMonitor, Throughput, ViewPanels):
        assert monitoring.rhythm() % kind().every_n_steps == 0


def test_turns__an_error_of_a_training_reaches_who_waits() -> None:
    def fail() -> None:
        raise ValueError("no such cache")

    turns = Turns()
    with pytest.raises(ValueError, match="no such cache"):
        turns.begin(fail)
    turns.end()
    turns = Turns()
    with pytest.raises(RuntimeError, match="before its time"):
        turns.begin(lambda: None)
    turns.end()


def test_hook_clock__counts_what_is_inside_once() -> None:
    def busy(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    clock = HookClock([EMATeacher()])
    with clock.profile("[Callback]EMATeacher.on_train_batch_end"), clock.counting("metrics.csv"):
        busy(0.05)
    with clock.profile("[Callback]Other.on_train_batch_end"):
        busy(0.05)
    with clock.counting("metrics.csv"):
        busy(0.02)
    assert clock.seconds.keys() == {"EMATeacher", "metrics.csv"}
    assert 0.05 <= clock.seconds["EMATeacher"] < 0.09 and 0.02 <= clock.seconds["metrics.csv"] < 0.05
