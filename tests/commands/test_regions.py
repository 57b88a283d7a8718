"""agssd regions: copies of caches with regions of each source, their sheet, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from agssd.cli import main
from agssd.data_modules.cache import VolumeCache


def test_regions__supervoxels_with_a_sheet(
    tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, sheet = tmp_path / "out.h5", tmp_path / "sheet.png"
    arguments = ["--source", "supervoxels", "--size-mm", "12", "--out", str(out), "--sheet", str(sheet), "--cases", "4"]
    assert main(["regions", str(tiny_cache), *arguments]) == 0
    cache = VolumeCache(out)
    for row, info in enumerate(cache.cases):
        body = cache.read_whole(row, "foreground") != 0
        expected = body.sum() / 12**3
        assert info.num_regions is not None and 0.5 * expected < info.num_regions < 4 * expected
        assert np.array_equal(cache.read_whole(row, "regions") != 0, body)
    assert f"written {out}: 8 cases" in capsys.readouterr().out
    picture = matplotlib.image.imread(sheet)[..., :3]
    assert picture.shape == (512, 1024, 3)
    assert ((picture.max(-1) - picture.min(-1)) > 0.1).mean() > 0.05  # colours upon grey
    assert main(["inspect", str(out), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["cases"]
    assert [case["num_regions"] for case in listed] == [info.num_regions for info in cache.cases]
    assert main(["inspect", str(out)]) == 0
    assert "regions" in capsys.readouterr().out.splitlines()[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.h5", "sheet.png"]


def test_regions__labels_of_frames(frames_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cine has no masks: one clear message, and nothing is left but what was done."""
    assert main(["regions", str(frames_cache), "--source", "labels", "--out", str(tmp_path / "out.h5")]) == 1
    assert "has no label map, which --source labels needs in every case" in capsys.readouterr().err
    assert not (tmp_path / "out.h5").exists()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_regions__labels_are_the_regions(tiny_cache: Path, tmp_path: Path, workers: int) -> None:
    out = tmp_path / "out.h5"
    assert main(["regions", str(tiny_cache), "--source", "labels", "--out", str(out), "--workers", str(workers)]) == 0
    cache = VolumeCache(out)
    for row in range(len(cache)):
        assert np.array_equal(cache.read_whole(row, "regions"), cache.read_whole(row, "label"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--source", "labels", "--size-mm", "3"], "--size-mm cannot be given with --source labels"),
        (["--source", "supervoxels", "--components"], "--components cannot be given with --source supervoxels"),
        (["--source", "sam"], "needs one of --sam DIR"),
        (["--source", "sam", "--sam", "nowhere"], "nowhere is no folder of a SamModel"),
        (["--source", "sam", "--checkpoint", "nowhere.ckpt"], "nowhere.ckpt does not exist"),
        (["--source", "labels", "--sheet", "a.jpg"], "must end in .png"),
        (["--source", "labels", "--workers", "0"], "--workers is 0"),
    ],
)
def test_regions__bad_arguments_are_one_line(
    tiny_cache: Path, tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["regions", str(tiny_cache), *arguments, "--out", str(tmp_path / "out.h5")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_regions__a_damaged_map_is_found_by_the_doctor(
    tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import h5py

    out = tmp_path / "out.h5"
    assert main(["regions", str(tiny_cache), "--source", "labels", "--out", str(out)]) == 0
    key = VolumeCache(out).cases[1].key
    with h5py.File(out, "r", locking=False) as file:
        regions = file[f"cases/{key}/regions"].id
        chunk = regions.get_chunk_info(regions.get_num_chunks() - 1)
    with out.open("r+b") as raw:
        raw.seek(chunk.byte_offset + chunk.size // 2)
        raw.write(b"\xff\xff\xff")
    capsys.readouterr()
    assert main(["doctor", str(out)]) == 3
    shown = capsys.readouterr().out
    assert f"cannot read regions of case {key}" in shown, shown
