"""Commands on caches of frames: what they say, draw and write."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from agssd.cli import main
from agssd.commands.report.facts import data_facts
from agssd.data_modules.cache import VolumeCache

CONF = Path(__file__).resolve().parents[2] / "conf"


def test_inspect__says_pixels_or_millimetres_and_draws_frames(
    frames_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(frames_cache), "--draw", str(tmp_path / "a.png"), "--cases", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("in pixels" in line for line in lines) == 10
    assert sum("0.3x0.2" in line for line in lines) == 1
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    assert (picture[..., 2] - picture[..., 0] > 60).sum() > 500  # the outline of the sector


def test_doctor__finds_nothing_wrong_with_frames(
    frames_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(frames_cache)]) == 0
    assert "field-of-view" not in capsys.readouterr().out


@pytest.mark.slow
def test_fit_and_report__on_frames(frames_cache: Path, tmp_path: Path) -> None:
    arguments = ["fit", "--config", str(CONF / "experiment/agssd_ultrasound_small.yaml"), "--data.cache",
                 str(frames_cache), "--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.max_steps", "1",
                 "--data.global_batch_size", "2", "--data.num_workers", "0", "--trainer.accelerator", "cpu",
                 "--online_probe.linear_steps", "2", "--views.num_local", "2"]  # fmt: skip
    assert main(arguments) == 0
    with (tmp_path / "run/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert any(row.get("probe/linear_seg_dice") for row in rows)
    assert list((tmp_path / "run/panels").glob("*.png"))
    page = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "run"), "--out", str(page), "--nifti", str(tmp_path / "maps")]) == 0
    text = page.read_text()
    assert '"frames": true' in text.replace('"frames":true', '"frames": true')
    assert ">frame <input" in text and ">coronal <input" not in text
    shapes = {nib.load(path).shape for path in (tmp_path / "maps").glob("*_attention.nii.gz")}
    assert shapes and shapes <= {(320, 240, 7), (320, 240, 1)}


@pytest.mark.slow
def test_regions_and_fit__of_both_recipes_on_frames(frames_cache: Path, tmp_path: Path) -> None:
    """The way from frames to regions to two pretrainings, by the commands of the README."""
    cache = tmp_path / "regions.h5"
    assert main(["regions", str(frames_cache), "--source", "supervoxels", "--out", str(cache)]) == 0
    for name in ("region_contrast_ultrasound_small", "agssd_ultrasound_small"):
        run = tmp_path / name
        arguments = ["fit", "--config", str(CONF / f"experiment/{name}.yaml"), "--data.cache", str(cache),
                     "--trainer.default_root_dir", str(run), "--trainer.max_steps", "3",
                     "--data.global_batch_size", "2", "--data.num_workers", "0", "--trainer.accelerator", "cpu",
                     "--view_panels.every_n_steps", "3"]  # fmt: skip
        assert main(arguments) == 0
        with (run / "metrics.csv").open() as file:
            losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
        assert len(losses) == 3 and np.isfinite(losses).all()
        assert list((run / "panels").glob("*.png"))


def test_report__data_of_frames_are_in_pixels_where_mm_are_not_known(frames_cache: Path) -> None:
    cache = VolumeCache(frames_cache)
    told = dict(data_facts(cast(Any, SimpleNamespace(cache=cache, no_cache=""))))["spacing"]
    assert told == "0.3 × 0.2; 1 × 1 mm or pixels, since their size in mm is not known (H × W)"
