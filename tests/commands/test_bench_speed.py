from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from agssd.commands import _bench_preemption
from agssd.commands import bench_speed as bench
from agssd.commands._bench_probe import write_cache
from agssd.commands._bench_rows import Figure
from agssd.commands._slurm_of_one_machine import missing


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(words)


def test_compare__ratio_is_other_over_ours() -> None:
    case = ("sleep", "short", lambda: time.sleep(0.004), "long", lambda: time.sleep(0.04))
    row = bench.compare(case, 3, torch.device("cpu"))
    assert row.ratio_low <= row.ratio <= row.ratio_high
    assert 5 < row.ratio < 11
    assert row.ours_ms >= 4 and row.other_ms >= 40


def test_reading__both_sides_read_the_same_voxels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = list(bench._reading(tmp_path))
    assert len(cases) == 2
    for _, _, ours, _, other in cases:
        assert ours()[0].shape == other().shape == (96, 96, 96)


@pytest.mark.parametrize("words", [("--rounds", "0"), ("--device", "cuda")])
def test_run__refuses_what_cannot_be(words: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert bench.run(arguments(*words)) == 1
    assert words[0] in capsys.readouterr().err


def test_run__writes_the_table_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "_cases", lambda *_: iter([("nothing", "a", lambda: None, "b", lambda: None)]))
    assert bench.run(arguments("--rounds", "2", "--out", str(tmp_path / "new"))) == 0
    report = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert [row["what"] for row in report["rows"]] == ["nothing"]
    assert report["machine"] in capsys.readouterr().out


def test_run__rows_before_one_that_fails_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cases(*_: Any) -> Iterator[Figure]:
        yield Figure("first", 1.0, "s", "")
        yield Figure("second", 2.0, "s", "")
        raise RuntimeError("the third cannot be had")

    monkeypatch.setattr(bench, "_cases", cases)
    with pytest.raises(RuntimeError, match="the third"):
        bench.run(arguments("--rounds", "1", "--out", str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    assert [row["what"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"]] == ["first", "second"]


@pytest.mark.slow
def test_time_probe__seconds_of_probes_and_of_the_default_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agssd.callbacks.online_probe import OnlineProbe
    from agssd.commands import _bench_probe

    monkeypatch.setattr(_bench_probe, "_SUBJECTS", {"train": 2, "val": 1})
    monkeypatch.setattr(_bench_probe, "STEPS_TIMED", 2)
    probed: list[int] = []
    original = OnlineProbe._measure

    def measure(self: OnlineProbe, trainer: Any, module: Any, *given: Any) -> Any:
        probed.append(trainer.global_step)
        time.sleep(0.5)
        return original(self, trainer, module, *given)

    monkeypatch.setattr(OnlineProbe, "_measure", measure)
    pairs = _bench_probe.time_probe(2, torch.device("cpu"), tmp_path)
    assert probed == [0, 2, 4]
    assert len(pairs) == 2 and _bench_probe.interval() == OnlineProbe().every_n_steps
    for probe, steps in pairs:
        assert probe > 0.5 and steps > 0


def test_run__figures_that_stand_alone_are_told_with_why_they_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = [
        Figure("signal to saved run", 1.25, "s", "one process"),
        Figure("requeued", None, "s", "no SLURM here"),
        Figure("CPU time", 0.456, "%", "of a step"),
    ]
    monkeypatch.setattr(bench, "_cases", lambda *_: iter(figures))
    assert bench.run(arguments("--rounds", "1", "--out", str(tmp_path))) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["value"] for row in rows] == [1.25, None, 0.456]
    said = capsys.readouterr().out
    assert re.search(r"signal to saved run +1\.2 s +one process", said)
    assert re.search(r"requeued +not measured: +no SLURM here", said)
    assert re.search(r"CPU time +0\.46 % +of a step", said)


@pytest.mark.parametrize(
    ("starts", "measured"), [(["exit 1"], []), (["stopped after step 3, 0.5 s after the signal"], [0.5])]
)
def test_with_agssd_fit__a_run_that_fails_has_no_figure_and_says_why(
    starts: list[str], measured: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first start does what it is told to, or neither does."""

    def run_until(command: list[str], directory: Path, steps: int) -> tuple[str, float]:
        if not starts or starts[0] == "exit 1":
            raise RuntimeError("the run has ended before step 3: MemoryError\nand more")
        return starts.pop(), 1.0

    monkeypatch.setattr(_bench_preemption, "_run_until", run_until)
    *whole, failed = _bench_preemption._with_agssd_fit(tmp_path / "none.yaml", tmp_path / "run")
    assert [figure.value for figure in whole] == measured
    assert failed.value is None and failed.note == "the run has ended before step 3: MemoryError"


def test_run_until__a_process_that_ends_too_early_is_told_with_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no cache\\n')"]
    with pytest.raises(RuntimeError, match="^the run has ended before step 3: no cache$"):
        _bench_preemption._run_until(command, tmp_path / "run", 3)


def test_saved_after__seconds_or_the_last_words() -> None:
    assert _bench_preemption._saved_after("x\nstopped after step 7, 1.25 s after the signal\n") == 1.25
    with pytest.raises(RuntimeError, match="^the run did not save itself; the last it said: killed$"):
        _bench_preemption._saved_after("step 7\nkilled\n\n")


@pytest.mark.parametrize("told", [{}, {"EligibleTime": "Unknown"}])
def test_may_start__an_answer_without_a_time_is_told(told: dict[str, str]) -> None:
    with pytest.raises(RuntimeError, match=rf"EligibleTime is {told.get('EligibleTime', 'missing')}"):
        _bench_preemption._may_start(told)
    now = time.strftime("%Y-%m-%dT%H:%M:%S")
    assert abs(_bench_preemption._may_start({"EligibleTime": now}) - time.time()) < 5


@pytest.mark.slow
def test_time_preemption__a_run_is_saved_within_its_limit_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_bench_preemption, "missing", lambda: "sbatch")
    saved, again, queued = _bench_preemption.time_preemption(torch.device("cpu"), tmp_path)
    assert saved.value is not None and 0 < saved.value < 60
    assert again.value is not None and again.value > 0
    assert queued.value is None and "sbatch not found" in queued.note
    assert len(list((tmp_path / "plain/checkpoints").glob("step*.ckpt"))) == 2


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason="no SLURM on this machine")
def test_with_slurm__parts_add_up_to_the_whole(tmp_path: Path) -> None:
    config = _bench_preemption._write_config(torch.device("cpu"), tmp_path)
    write_cache(tmp_path / "preemption.h5")
    saved, queued, waits, started, whole = _bench_preemption._with_slurm(config, tmp_path)
    assert saved.value is not None and queued.value is not None and started.value is not None
    assert waits.value is not None and 60 < waits.value < 200  # which it is spared
    assert whole.value == pytest.approx(saved.value + queued.value + started.value)
    assert 0 < saved.value < 60 and queued.value > 0 and started.value > 0


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason="no SLURM on this machine")
def test_with_slurm__a_job_that_fails_is_told_at_once(tmp_path: Path) -> None:
    config = _bench_preemption._write_config(torch.device("cpu"), tmp_path)  # whose cache is no cache
    (tmp_path / "preemption.h5").write_bytes(b"torn")
    (figure,) = _bench_preemption._with_slurm(config, tmp_path)
    assert figure.value is None
    assert "ended before its first steps" in figure.note
