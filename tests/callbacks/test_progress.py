"""A report says what is known, rarely enough that the device is not waited for, and a log gets plain lines."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from agssd.callbacks import progress
from agssd.callbacks.progress import Figures, LineProgress, Progress, RichProgress, duration
from agssd.callbacks.standing import log_figures


class Clock:
    """Moves by a second per optimiser step."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Return the steps at which somebody looked at the metrics."""
    seen: list[int] = []
    inner = pl.Trainer.callback_metrics.fget  # type: ignore[attr-defined]

    def look(trainer: pl.Trainer) -> Any:
        seen.append(trainer.global_step)
        return inner(trainer)

    monkeypatch.setattr(pl.Trainer, "callback_metrics", property(look))
    yield seen


def logging_toy(base: Any, clock: Clock) -> pl.LightningModule:
    class Logging(base):  # type: ignore[valid-type, misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("train/loss", torch.tensor(3.0 - batch_idx / 64), prog_bar=True)
            return loss

        def on_train_batch_end(self, *_: Any) -> None:
            clock.now += 1

    return Logging()


def test_lines__every_so_many_seconds_and_at_both_ends(
    toy: Any, loader: Any, make_trainer: Any, clock: Clock, looks: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(LineProgress(10), max_steps=45, enable_progress_bar=True)
    trainer.fit(logging_toy(toy, clock), loader)
    out = capsys.readouterr().out
    assert "\r" not in out and "\x1b" not in out
    lines = [line for line in out.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["1/45", "11/45", "21/45", "31/45", "41/45", "45/45"]
    assert lines[0] == "step 1/45 (2.2 %) loss 3"
    assert lines[1] == f"step 11/45 (24.4 %) loss {3 - 10 / 64:.4g} left 34 s"
    assert looks == [1, 11, 21, 31, 41, 45]  # each look waits for the device


def test_lines__count_optimiser_steps_and_only_rank_zero_speaks(
    toy: Any, loader: Any, make_trainer: Any, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"max_steps": 4, "enable_progress_bar": True, "accumulate_grad_batches": 3}
    make_trainer(LineProgress(0), **settings).fit(logging_toy(toy, clock), loader)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    other = LineProgress(0)
    trainer = make_trainer(other, **settings)
    other.disable()  # as Lightning does on every rank but the first
    trainer.fit(logging_toy(toy, clock), loader)
    assert "step 1" not in capsys.readouterr().out


def test_figures__speed_wait_and_collapse_state_are_those_of_the_metrics(clock: Clock) -> None:
    trainer: Any = SimpleNamespace(
        global_step=100,
        max_steps=1100,
        loggers=[],
        callback_metrics={},
        datamodule=SimpleNamespace(global_batch_size=8),
    )
    figures = Figures()
    assert figures(trainer) == {}
    clock.now, trainer.global_step = 50.0, 200
    assert figures(trainer) == {"samples/s": "16", "left": "7 min"}  # 2 steps/s, 8 samples each; 900 steps to go
    log_figures(trainer, {"throughput/samples_per_s": 812.0, "throughput/data_wait": 0.03, "collapse/alarms": 0.0})
    shown = figures(trainer)
    assert (shown["samples/s"], shown["data wait"], shown["collapse"]) == ("812", "3 %", "ok")
    log_figures(trainer, {"collapse/alarms": 2.0})
    assert figures(trainer)["collapse"] == "2 alarm(s)"
    trainer.global_step = 150  # rolled back: what was measured before says nothing about the time left
    assert "left" not in figures(trainer)
    clock.now, trainer.global_step = 60.0, 160
    assert figures(trainer)["left"] == duration(940 / 1.0)


def test_lines__validation_is_a_report(
    toy: Any, loader: Any, make_trainer: Any, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    class Validated(toy):  # type: ignore[valid-type, misc]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", 2.5)

    settings = {"limit_val_batches": 2, "val_check_interval": 3, "check_val_every_n_epoch": None}
    trainer = make_trainer(LineProgress(1e9), max_steps=3, enable_progress_bar=True, num_sanity_val_steps=0, **settings)
    trainer.fit(Validated(), loader, loader)
    out = capsys.readouterr().out.splitlines()
    assert "step 3/3 (100.0 %) validation val/loss 2.5" in out


def test_rich__shows_the_figures_and_looks_rarely(
    toy: Any, loader: Any, make_trainer: Any, clock: Clock, looks: list[int]
) -> None:
    screen = io.StringIO()
    bar = RichProgress(leave=True, console_kwargs={"file": screen, "force_terminal": True, "width": 200})
    trainer = make_trainer(bar, max_steps=22, enable_progress_bar=True)
    trainer.fit(logging_toy(toy, clock), loader)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "22/22" in text and "loss: " in text and "left: " in text
    assert looks[:4] == [1, 6, 11, 16] and len(looks) <= 6  # every 5 seconds, and once at the end


@pytest.mark.parametrize(
    ("mode", "terminal", "term", "expected"),
    [
        ("auto", True, "xterm", RichProgress),
        ("auto", True, "dumb", LineProgress),
        ("auto", False, "xterm", LineProgress),
        ("rich", False, "xterm", RichProgress),
        ("lines", True, "xterm", LineProgress),
        ("off", True, "xterm", type(None)),
    ],
)
def test_progress__mode(
    monkeypatch: pytest.MonkeyPatch, mode: Any, terminal: bool, term: str, expected: type[Any]
) -> None:
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: terminal))
    monkeypatch.setenv("TERM", term)
    assert type(Progress(mode).callback()) is expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (3599, "59 min"), (11520, "3 h 12 min"), (200000, "2 d 7 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
