from __future__ import annotations

import argparse
import json
import re
import time
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
