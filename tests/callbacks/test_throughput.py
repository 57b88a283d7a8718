"""Speed is wall time without validation; data wait is the loader's share of it, not that of making views."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.profilers import SimpleProfiler
from torch.utils.data import DataLoader, Dataset

from agssd.callbacks.throughput import Throughput, _batch_size, _remedy, _samples_per_step


class Clock:
    """A clock that only moves when told to, so that the tests do not depend on the machine's load."""

    def __init__(self) -> None:
        self.now = 100.0

    def spend(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now


class Slow(Dataset):
    """Each item takes ``seconds`` to read."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock = clock
        self.seconds = seconds

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> torch.Tensor:
        self.clock.spend(self.seconds)
        return torch.ones(4)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("agssd.callbacks.throughput.time", clock)
    return clock


def _rows(folder: Path) -> list[dict[str, float]]:
    with open(folder / "metrics.csv", newline="") as file:
        table = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in table if "throughput/s_per_step" in row]


def _slow_views(toy, clock: Clock, seconds: float):
    class SlowViews(toy):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            clock.spend(seconds)
            return [batch]

        def validation_step(self, batch, batch_idx):
            clock.spend(300.0)

    return SlowViews()


def test_throughput__separates_data_wait_from_making_views(toy, make_trainer, tmp_path, caplog, clock) -> None:
    # in each of 2 micro-batches: 2 items x 1 s of reading, and 3 s of views
    trainer = make_trainer(Throughput(5), max_steps=10, accumulate_grad_batches=2)
    trainer.fit(_slow_views(toy, clock, 3.0), DataLoader(Slow(clock, 1.0), batch_size=2))
    rows = _rows(tmp_path)
    assert [row["step"] for row in rows] == [4, 9]
    for row in rows:
        assert row["throughput/s_per_step"] == pytest.approx(10)
        assert row["throughput/data_wait"] == pytest.approx(0.4)
        assert row["throughput/samples_per_s"] == pytest.approx(0.4)
        assert 0.05 < row["throughput/peak_memory_gib"] < 64
    spoken = [record.getMessage() for record in caplog.records if record.name.startswith("agssd")]
    assert len(spoken) == 1
    assert "40 % of the last 4 steps (4.00 of 10.00 s each) went by waiting for data, more than 3 %; " in spoken[0]
    assert spoken[0].endswith("the training process reads by itself: set data.num_workers to about 1")


class Reading(Dataset):
    """Each item takes 30 ms, asleep as in waiting for a disk or at work as in decoding."""

    def __init__(self, asleep: bool) -> None:
        self.asleep = asleep

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> torch.Tensor:
        end = time.thread_time() + 0.03
        if self.asleep:
            time.sleep(0.03)
        while not self.asleep and time.thread_time() < end:
            pass
        return torch.ones(4)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="only Linux tells what a process waited for")
@pytest.mark.parametrize("asleep", [False, True])
def test_throughput__tells_busy_workers_from_a_slow_disk(toy, make_trainer, caplog, asleep: bool) -> None:
    trainer = make_trainer(Throughput(10), max_steps=20)
    trainer.fit(toy(), DataLoader(Reading(asleep), batch_size=2, num_workers=2))
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("agssd")]
    assert ("waited for the disk" in said) == asleep
    assert asleep or ("workers" in said and "at work" in said)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ((0.75, 0, None, 8), "reads by itself: set data.num_workers to about 3"),
        (
            (0.5, 2, 0.9, 8),
            "the 2 worker(s), which were at work 90 % of the time, are too few: set data.num_workers to about 4",
        ),
        ((0.05, 2, 1.4, 8), "at work 100 % of the time, are too few: set data.num_workers to about 3"),
        ((0.5, 8, None, 8), "about 16 workers instead of 8, would keep up, but this process may use 8 processor(s)"),
        ((0.5, 2, 0.1, 8), "at work 10 % of the time and waited for the disk"),
        ((1.0, 2, 1.0, 999), "about 200"),
        ((0.5, None, None, 8), "raise the number of workers"),
    ],
)
def test_remedy__names_the_cause_and_a_number(case: tuple, said: str) -> None:
    assert said in _remedy(*case)


def test_throughput__says_nothing_when_data_is_in_time(toy, make_trainer, tmp_path, caplog, clock) -> None:
    trainer = make_trainer(Throughput(5), max_steps=10)
    trainer.fit(_slow_views(toy, clock, 10.0), DataLoader(Slow(clock, 0.1), batch_size=2))
    assert [row["throughput/data_wait"] for row in _rows(tmp_path)] == pytest.approx([0.2 / 10.2] * 2)
    assert not [record for record in caplog.records if record.name.startswith("agssd")]


def test_throughput__leaves_validation_out(toy, make_trainer, tmp_path, clock) -> None:
    settings = {"max_steps": 6, "val_check_interval": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    training, validation = DataLoader(Slow(clock, 1.0), batch_size=2), DataLoader(Slow(clock, 0.0), batch_size=2)
    make_trainer(Throughput(3), **settings).fit(_slow_views(toy, clock, 0.0), training, validation)
    assert clock.now > 1000
    assert [row["throughput/s_per_step"] for row in _rows(tmp_path)] == pytest.approx([2.0, 2.0])


def test_throughput__keeps_the_users_profiler_and_gives_it_back(toy, loader, make_trainer) -> None:
    profiler = SimpleProfiler()
    trainer = make_trainer(Throughput(2), max_steps=4, profiler=profiler)
    trainer.fit(toy(), loader)
    assert trainer.profiler is profiler
    assert len(profiler.recorded_durations["[_TrainingEpochLoop].train_dataloader_next"]) >= 4
    assert len(profiler.recorded_durations["run_training_batch"]) == 4


def test_throughput__works_for_a_module_without_protocols(plain, loader, make_trainer, tmp_path) -> None:
    make_trainer(Throughput(2), max_steps=4).fit(plain(), loader)
    assert len(_rows(tmp_path)) == 2


def test_samples_per_step__believes_the_data_module_and_else_counts() -> None:
    trainer = SimpleNamespace(datamodule=SimpleNamespace(global_batch_size=24), accumulate_grad_batches=3, world_size=2)
    assert _samples_per_step(trainer, torch.ones(8, 1)) == 24
    trainer.datamodule = None
    assert _samples_per_step(trainer, torch.ones(8, 1)) == 48
    assert _batch_size({"views": torch.ones(16, 1), "sample": torch.arange(8)}) == 8
    assert _batch_size([torch.ones(5, 2), torch.ones(9)]) == 5
    assert _batch_size({"name": "x", "nothing": None}) == 0


def test_throughput__nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="throughput.every_n_steps is 0"):
        Throughput(0)
