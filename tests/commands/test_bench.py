from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import pytest
import torch

from agssd.commands import bench


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
