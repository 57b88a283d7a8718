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
from agssd.commands._bench_preemption import Seconds


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


def test_run__times_that_stand_alone_are_told_with_why_they_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = [Seconds("signal to saved run", 1.25, "one process"), Seconds("requeued", None, "no SLURM here")]
    monkeypatch.setattr(bench, "_cases", lambda *_: iter(times))
    assert bench.run(arguments("--rounds", "1", "--out", str(tmp_path))) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["seconds"] for row in rows] == [1.25, None]
    said = capsys.readouterr().out
    assert re.search(r"signal to saved run +1\.2 s +one process", said)
    assert re.search(r"requeued +not measured +no SLURM here", said)


@pytest.mark.slow
def test_time_preemption__a_run_is_saved_within_its_limit_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_bench_preemption, "missing", lambda: "sbatch")
    saved, again, queued = _bench_preemption.time_preemption(torch.device("cpu"), tmp_path)
    assert saved.seconds is not None and 0 < saved.seconds < 60
    assert again.seconds is not None and again.seconds > 0
    assert queued.seconds is None and "sbatch not found" in queued.note
    assert len(list((tmp_path / "plain/checkpoints").glob("step*.ckpt"))) == 2
