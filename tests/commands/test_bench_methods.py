"""``agssd bench-methods``: what becomes of a run's metrics, which rows there are, and that failures are said."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from agssd.cli import main
from agssd.commands.bench_methods import _wanted, read_run, table

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, rows: list[dict[str, float]]) -> Path:
    keys = sorted({key for row in rows for key in row})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_read_run__takes_first_loss_mean_of_the_last_ten_and_both_probes(tmp_path: Path) -> None:
    losses = [{"step": i, "train/loss": 10.0 - i / 4, "train/loss_rec": 1.0 / (1 + i)} for i in range(30)]
    probes = [{"step": 0, "probe/linear_seg_dice": 0.25}, {"step": 29, "probe/linear_seg_dice": 0.5}]
    speed = [{"throughput/samples_per_s": value, "throughput/peak_memory_gib": value / 100} for value in (10, 90, 30)]
    alarms = [{"collapse/alarms": 0.0}, {"collapse/alarms": 2.0}]
    metrics = write(tmp_path / "metrics.csv", [probes[0], *losses, *speed, *alarms, probes[1]])
    row = read_run("a", "", metrics, 1.0)
    assert row.loss == pytest.approx((10.0, sum(10 - i / 4 for i in range(20, 30)) / 10))
    assert row.terms["rec"][0] == 1.0
    assert row.probes == {"linear_seg_dice": (0.25, 0.5)}
    assert (row.samples_per_s, row.peak_memory_gib, row.alarms) == (30.0, 0.9, 2)
    text = table([row])
    assert "| a | 10.000 → 3.875 | 0.250 → 0.500 | 30.0 | 0.90 | 2 |" in text.splitlines()
    widths = {line.count("|") for line in text.splitlines()}
    assert len(widths) == 1, "a cell too many or too few"


def test_read_run__refuses_metrics_without_two_probes(tmp_path: Path) -> None:
    metrics = write(tmp_path / "metrics.csv", [{"train/loss": 1.0, "probe/linear_seg_dice": 0.5}])
    with pytest.raises(ValueError, match="no probe before and after"):
        read_run("a", "", metrics, 1.0)


def test_wanted__names_rows_and_refuses_what_is_not_there(tmp_path: Path) -> None:
    yaml = tmp_path / "dino.yaml"
    yaml.write_text("")
    found = _wanted([str(yaml)], [f"dino, small {yaml} --model.lr 1e-3"])
    assert found == {"dino": ["--model", str(yaml)], "dino, small": ["--model", str(yaml), "--model.lr", "1e-3"]}
    with pytest.raises(ValueError, match="two rows are named 'dino'"):
        _wanted([str(yaml)], [f"dino {yaml}"])
    with pytest.raises(ValueError, match="give a name, a YAML and flags"):
        _wanted([], ["dino --model.lr 1e-3"])
    with pytest.raises(ValueError, match="there is no method file"):
        _wanted([str(tmp_path / "other.yaml")], [])


@pytest.mark.slow
def test_bench_methods__trains_tabulates_goes_on_and_says_what_failed(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    command = ["bench-methods", str(tiny_cache), "conf/method/simmim.yaml", "--out", str(out), "--steps", "3"]
    command += ["--flags", "--data.num_workers 0 --data.global_batch_size 2 --online_probe.linear_steps 2"]
    assert main(command) == 0
    first = json.loads((out / "methods.json").read_text())["rows"]
    assert [row["name"] for row in first] == ["simmim"]
    assert math.isfinite(first[0]["loss"][1]) and first[0]["samples_per_s"] > 0
    trained = (out / "simmim" / "metrics.csv").stat().st_mtime_ns
    assert main([*command, "--also", "broken conf/method/simmim.yaml --model.mask_block 7"]) == 1
    assert (out / "simmim" / "metrics.csv").stat().st_mtime_ns == trained, "trained again"
    said = capsys.readouterr()
    assert "broken: failed" in said.out and "mask_block is 7" in said.out and "broken failed" in said.err
    assert [row["name"] for row in json.loads((out / "methods.json").read_text())["rows"]] == ["simmim"]
    assert "Failed: broken.\n" in (out / "methods.md").read_text()


def test_train__folder_in_use__says_by_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "simmim").mkdir()
    method = str(ROOT / "conf/method/simmim.yaml")
    command = ["bench-methods", "cache.h5", method, "--out", str(tmp_path)]
    assert main(command) == 1
    assert "simmim holds a run that did not end; remove it" in capsys.readouterr().out
    (tmp_path / "simmim/bench.json").write_text('{"command": "another", "seconds": 1}')
    assert main(command) == 1
    assert "simmim holds a run of another command; remove it" in capsys.readouterr().out
